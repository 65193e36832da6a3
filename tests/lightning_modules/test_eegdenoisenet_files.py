"""EEGDenoiseNet: files that are absent, damaged or of another shape are named, and never opened by pickle."""

import os
import pickle

import numpy as np
import pytest
import torch
from eeg_files import (
    loaded,
    write_small_data_set,
)
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
        (lambda lines: [line.replace("train", "test") for line in lines], "none is left for train"),
        (lambda lines: [line.replace("test", "train") for line in lines], "none is left for test"),
        (lambda lines: [lines[0], *["1,here,train\r\n"] * 119, "2,here,test\r\n"], "none is left for train"),
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
