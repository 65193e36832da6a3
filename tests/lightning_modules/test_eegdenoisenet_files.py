"""EEGDenoiseNet: files that are absent, damaged or of another shape are named, and never opened by pickle."""

import os
import pickle

import numpy as np
import pytest
import torch
from eeg_files import EEG_SUBJECTS, loaded, write_small_data_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_modules.data.files import DataFileError


@pytest.fixture
def folder(tmp_path):
    write_small_data_set(tmp_path)
    return tmp_path


def test_absent_artifact_file_is_named(folder):
    with pytest.raises(DataFileError, match=r"EMG_all_epochs\.npy: found no such file") as error:
        loaded(folder, artifact="EMG")
    assert error.value.path == folder / "EMG_all_epochs.npy"
    from_another_process = pickle.loads(pickle.dumps(error.value))
    assert (str(from_another_process), from_another_process.path) == (str(error.value), error.value.path)


def test_double_precision_file_is_accepted(folder):
    path = folder / "EEG_all_epochs.npy"
    epochs = np.load(path)
    np.save(path, epochs.astype(np.float64))
    assert loaded(folder).train_set.clean.dtype == torch.float32


def changed(row, value):
    def change(epochs):
        epochs[row] = value
        return epochs

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed(7, np.nan), "1 epochs with NaN or infinite values, the first in row 7"),
        (changed((3, 5), -np.inf), "the first in row 3"),
        (changed(2, 0), "zero throughout, the first in row 2"),
        (changed(slice(5, None, 10), 5), "12 epochs that are flat, of one value throughout, the first in row 5"),
        (changed(119, -3.3), "1 epochs that are flat, of one value throughout, the first in row 119"),
        (changed(4, 1e4 + 1e-3 * np.sin(np.arange(512))), "flat, of one value throughout, the first in row 4"),
        (lambda epochs: 1e-20 * epochs, "120 epochs whose squares float32 cannot hold, the first in row 0"),
        (lambda epochs: 1e25 * epochs, "120 epochs whose squares float32 cannot hold"),
        (lambda epochs: epochs.astype(np.float64) * 1e60, "infinite values"),
        (lambda epochs: epochs[:, :500], r"shape \(120, 500\)"),
        (lambda epochs: epochs[0], r"shape \(512,\)"),
        (lambda epochs: epochs[None], r"shape \(1, 120, 512\)"),
        (lambda epochs: epochs[:0], r"shape \(0, 512\)"),
        (lambda epochs: epochs.astype(np.int16), "data type int16"),
        (lambda epochs: epochs.astype(np.complex64), "data type complex64"),
        (lambda epochs: epochs.astype(object), "cannot be read"),
    ],
)
def test_unfit_arrays_are_refused(folder, change, match):
    path = folder / "EEG_all_epochs.npy"
    np.save(path, change(np.load(path)), allow_pickle=True)
    with pytest.raises(DataFileError, match=match) as error:
        loaded(folder)
    assert str(path) in str(error.value) and "expected" in str(error.value)


@pytest.mark.parametrize("length", [0, 5, 20, 100, 5000])
def test_truncated_array_is_refused(folder, length):
    path = folder / "EOG_all_epochs.npy"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataFileError, match=r"EOG_all_epochs\.npy: found a file that cannot be read"):
        loaded(folder)


class Exploding:
    def __reduce__(self):
        return (os._exit, (3,))


def test_pickle_is_never_opened(folder):
    (folder / "EEG_all_epochs.npy").write_bytes(pickle.dumps(Exploding()))
    with pytest.raises(DataFileError, match="cannot be read"):
        loaded(folder)


def test_archive_is_refused(folder):
    np.savez(folder / "archive.npz", epochs=np.ones((3, 512), dtype=np.float32))
    (folder / "archive.npz").rename(folder / "EEG_all_epochs.npy")
    with pytest.raises(DataFileError, match="npz archive"):
        loaded(folder)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 127), byte=st.integers(0, 255))
def test_damaged_header_is_refused_or_harmless(folder, position, byte):
    path = folder / "EOG_all_epochs.npy"
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[position] = byte
    path.write_bytes(damaged)
    try:
        loaded(folder)
    except DataFileError as error:
        assert error.path in (path, folder / "EOG_index.csv")
    finally:
        path.write_bytes(intact)


def index_lines(folder):
    return (folder / "EEG_index.csv").read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lines: lines[:-1], "found 119 lines; expected .* 120 lines"),
        (lambda lines: [*lines, lines[-1]], "found 121 lines"),
        (lambda lines: [], "no|columns"),
        (lambda lines: ["subject,source,part\r\n", *lines[1:]], "the columns subject, source, part"),
        (lambda lines: [*lines[:5], "1,here,maybe\r\n", *lines[6:]], "split 'maybe' in row 4"),
        (lambda lines: [*lines[:5], "1\r\n", *lines[6:]], "entries than columns in row 4"),
        (lambda lines: [*lines[:5], "1,here,train,more\r\n", *lines[6:]], "entries than columns in row 4"),
        (lambda lines: [*lines[:5], "1,here,\r\n", *lines[6:]], "split '' in row 4"),
        (lambda lines: [*lines[:5], ",here,train\r\n", *lines[6:]], "nothing as subject in row 4"),
        (lambda lines: [*lines[:5], "NaN,here,train\r\n", *lines[6:]], "NaN as subject in row 4"),
        (lambda lines: ["subject,split,Split\r\n", *lines[1:]], "column split more than once"),
        (lambda lines: ["SUBJECT,subject ,split\r\n", *lines[1:]], "column subject more than once"),
        (lambda lines: ["subjects,source,split\r\n", *lines[1:]], "columns subjects, source, split; expected a column"),
        (lambda lines: ["sep=;\r\n", *lines], "the columns sep="),
        (lambda lines: [*lines[:5], '1,"here,train\r\n', *lines[6:]], "cannot be read|lines"),
        (lambda lines: ["1,here,train\r\n", *lines[1:]], "the columns 1, here, train"),
        (lambda lines: [*lines[:1], "7,here,test\r\n", *lines[2:]], "subjects in both train and test"),
        (lambda lines: [line.replace("train", "test") for line in lines], "none is left for train"),
        (lambda lines: [line.replace("test", "train") for line in lines], "none is left for test"),
        (lambda lines: [lines[0], *["1,here,train\r\n"] * 119, "2,here,test\r\n"], "none is left for train"),
        (lambda lines: [lines[0], *["A1,a,train\r\n", "a1,b,train\r\n"] * 59, *["2,c,test\r\n"] * 2], "left for train"),
    ],
)
def test_unfit_index_is_refused(folder, change, match):
    (folder / "EEG_index.csv").write_text("".join(change(index_lines(folder))))
    with pytest.raises(DataFileError, match=match) as error:
        loaded(folder)
    assert str(folder / "EEG_index.csv") in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00split", b"split\n" + b"tr\x00ain\n" * 120])
def test_binary_index_is_refused(folder, content):
    (folder / "EEG_index.csv").write_bytes(content)
    with pytest.raises(DataFileError, match=r"EEG_index\.csv"):
        loaded(folder)


# Spreadsheets and other ways to write the same index


SPELLINGS = {
    "byte-order mark": (str, "utf-8-sig"),
    "UTF-16": (str, "utf-16"),
    "semicolons": (lambda text: text.replace(",", ";"), "utf-8-sig"),
    "tabs": (lambda text: text.replace(",", "\t"), "utf-16"),
    "capitals": (str.upper, "utf-8"),
    "title case": (str.title, "utf-8"),
    "blanks": (lambda text: text.replace(",", " , ").replace("\r\n", " \r\n "), "utf-8"),
    "no carriage returns": (lambda text: text.replace("\r", ""), "utf-8"),
    "only carriage returns": (lambda text: text.replace("\n", ""), "utf-8"),
    "quotes": (lambda text: '"' + text.strip().replace(",", '","').replace("\r\n", '"\r\n"') + '"', "utf-8"),
    "lines of blanks": (lambda text: text + ",,\r\n \r\n,,\r\n", "utf-8"),
    "empty lines": (lambda text: text.replace("\r\n", "\r\n\r\n"), "utf-8"),
    "a column without a name": (lambda text: "," + text.strip().replace("\r\n", "\r\n0,") + "\r\n", "utf-8"),
    "decimal subjects": (lambda text: "\r\n".join(decimals(text.splitlines())), "utf-8"),
}


def decimals(lines):
    """Every other subject as 7.0, and some as 07."""
    yield lines[0]
    for number, line in enumerate(lines[1:]):
        subject, rest = line.split(",", 1)
        yield f"{(subject, f'{subject}.0', f'0{subject}')[number // EEG_SUBJECTS % 3]},{rest}"


def rows_of(data):
    parts = (data.train_set, data.val_set, data.test_set)
    return [sorted({int(value) for value in part.clean[:, 0]}) for part in parts]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_index_is_the_same_in_any_spelling(folder, spelling):
    path, expected = folder / "EEG_index.csv", rows_of(loaded(folder))
    change, encoding = SPELLINGS[spelling]
    text = path.read_bytes().decode()
    path.write_bytes(change(text).encode(encoding))
    assert rows_of(loaded(folder)) == expected


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_subject_is_in_two_parts_however_it_is_written(folder, data):
    """Names with capitals, blanks and marks at random: the parts share no subject, or the index is refused."""
    groups = data.draw(st.integers(2, 30))
    ways = st.sampled_from(["s{}", "S{}", " s{} ", "{}", "{}.0", "0{}"])
    subject = [row % groups for row in range(120)]
    way = {group: data.draw(st.sampled_from([ways, st.sampled_from(["s{}", "S{}"])])) for group in range(groups)}
    lines = [f"{data.draw(way[s]).format(s)},{'test' if s == 0 else 'train'}" for s in subject]
    (folder / "EEG_index.csv").write_text("\n".join(["Subject,SPLIT", *lines]), encoding="utf-8-sig")
    try:
        parts = rows_of(loaded(folder))
    except DataFileError:
        return
    # The same text but for case, blanks and leading or trailing zeros is the same subject.
    names = [line.split(",")[0].strip().lower().removesuffix(".0").lstrip("0") for line in lines]
    subjects = [{names[row - 1] for row in part} for part in parts]
    assert sum(map(len, subjects)) == len(set.union(*subjects)) == len(set(names))
    assert sum(map(len, parts)) == 120


@pytest.mark.parametrize(
    "name", ["eeg_index.csv", "EEG_Index.csv", "EEG_index.xlsx", "EEG_index.tsv", "EEG_index.csv.txt"]
)
def test_an_index_under_another_name_is_not_passed_over(folder, name):
    (folder / "EEG_index.csv").rename(folder / name)
    with pytest.raises(DataFileError, match=f"EEG_index.csv: found no such file, but {name}; .*take it out"):
        loaded(folder)


def test_an_index_that_is_no_file_is_not_passed_over(folder):
    path = folder / "EEG_index.csv"
    path.unlink()
    path.symlink_to(folder / "nowhere")
    with pytest.raises(DataFileError, match="found no file; expected an index"):
        loaded(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataFileError, match="found no file; expected an index"):
        loaded(folder)


def test_an_artifact_index_without_recordings_is_refused(folder):
    path = folder / "EOG_index.csv"
    path.write_text(path.read_text().replace("record", "subject").replace("source", "place"))
    with pytest.raises(DataFileError, match=r"columns subject, place, split; expected a column source or record"):
        loaded(folder)


def test_what_was_read_is_printed_once(folder, caplog):
    caplog.set_level("INFO")
    (folder / "EOG_index.csv").unlink()
    data = loaded(folder, artifact="EOG")
    data.setup("test")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{folder}/EEG_all_epochs.npy: 120 epochs, 84 for training, 12 for validation, 24 for test, by EEG_index.csv, "
        "of 14, 2 and 4 subjects.",
        f"{folder}/EOG_all_epochs.npy: 60 epochs, 48 for training, 6 for validation, 6 for test, in contiguous runs: "
        "there is no EOG_index.csv.",
        "Mixtures of EEG and EOG: 84 an epoch in training, 10 in validation, 240 in test.",
    ]
