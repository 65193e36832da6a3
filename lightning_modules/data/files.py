"""Reading of data files, none of it through pickle: a bad file is an error that says what is wrong with it."""

from __future__ import annotations

import codecs
import csv
import io
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from pibinn_plugin.errors import one_line

__all__ = ["DataFileError", "read_epochs", "read_index"]

# Whatever the unit: the sum of the squares of an epoch must be a float32, neither 0 nor infinite.
SMALLEST_AMPLITUDE, LARGEST_AMPLITUDE = 1e-15, 1e15


class DataFileError(ValueError):
    """A data file is absent or does not hold what it should.

    Args:
        path: The file.
        found: What it holds.
        expected: What it should hold.
        remedy: What the user can do.

    Example:
        >>> print(DataFileError(Path("EEG_all_epochs.npy"), "no such file", "an array", "Download it."))
        EEG_all_epochs.npy: found no such file; expected an array. Download it.
    """

    def __init__(self, path: Path, found: str, expected: str, remedy: str) -> None:
        super().__init__(path, found, expected, remedy)  # of which pickle makes it again in another process
        self.path = path

    @override
    def __str__(self) -> str:
        path, found, expected, remedy = self.args
        return one_line(f"{path}: found {found}; expected {expected}. {remedy}")


def read_epochs(path: str | Path, samples: int) -> npt.NDArray[np.float32]:
    """Read an array of epochs from a `.npy` file.

    Args:
        path: The file: epochs by samples, float32 or float64.
        samples: The number of samples an epoch must have.

    Returns:
        The epochs, shape (epochs, samples), float32, all finite and none flat.

    Raises:
        DataFileError: If the file is absent, damaged, of another shape or data type, or holds values that are not
            finite, epochs without a signal (zero, or one value throughout but for rounding), or amplitudes whose
            squares float32 cannot hold.
    """
    path = Path(path)
    expected = f"a .npy array of shape (epochs, {samples}), float32"
    replace = "Replace the file with an intact copy."
    if not path.is_file():
        raise DataFileError(path, "no such file", expected, "Put the file there or point data_dir at its folder.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        raise DataFileError(path, f"a file that cannot be read ({error})", expected, replace) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataFileError(path, "an .npz archive", expected, "Save the array alone, with numpy.save.")
    if array.dtype not in (np.float32, np.float64):
        raise DataFileError(path, f"data type {array.dtype}", expected, "Convert the array with astype('float32').")
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != samples:
        remedy = f"Cut the recordings into epochs of {samples} samples, one a row."
        raise DataFileError(path, f"shape {array.shape}", expected, remedy)
    with np.errstate(over="ignore"):
        epochs = np.ascontiguousarray(array, dtype=np.float32)
    _refuse_rows(path, ~np.isfinite(epochs).all(axis=1), "with NaN or infinite values", "finite values")
    _refuse_rows(path, ~epochs.any(axis=1), "that are zero throughout", "a signal in every epoch")
    largest = np.abs(epochs).max(axis=1)
    span = epochs.max(axis=1).astype(np.float64) - epochs.min(axis=1)
    is_flat = span <= 8 * np.finfo(np.float32).eps * largest
    _refuse_rows(path, is_flat, "that are flat, of one value throughout", "a signal in every epoch")
    is_extreme = (largest < SMALLEST_AMPLITUDE) | (largest > LARGEST_AMPLITUDE)
    between = f"amplitudes from {SMALLEST_AMPLITUDE:g} to {LARGEST_AMPLITUDE:g}, as in µV or V"
    _refuse_rows(path, is_extreme, "whose squares float32 cannot hold", between)
    return epochs


def _refuse_rows(path: Path, is_refused: Any, what: str, expected: str) -> None:
    if is_refused.any():
        found = f"{np.count_nonzero(is_refused)} epochs {what}, the first in row {is_refused.argmax()}"
        raise DataFileError(path, found, expected, "Drop these rows (and their rows of the index), or correct them.")


def read_index(path: str | Path, rows: int) -> list[dict[str, str]] | None:
    r"""Read the index of an array of epochs: a CSV file with a header and one line an epoch.

    Spreadsheets write the same table in many ways, and all of these are read: UTF-8 with or without a byte-order mark,
    UTF-16 with one, commas, semicolons or tabs, names and splits in any case and with blanks around them.

    Args:
        path: The file; its column `split` says `train` or `test`, the others are free.
        rows: The number of epochs it must describe.

    Returns:
        One dict an epoch from column to entry, or None if there is no such file. Columns and splits are in lower case,
        nothing has blanks around it.

    Raises:
        DataFileError: If the file cannot be read, has no column `split`, a column twice, another number of lines,
            incomplete lines, or a split other than train and test; or if there is none, but one of a similar name.

    Example:
        >>> path = Path(f"{tmp_path}/EEG_index.csv")
        >>> _ = path.write_text("Subject; Split\nanna;Train\nbert;test\n", encoding="utf-8-sig")
        >>> read_index(path, rows=2)
        [{'subject': 'anna', 'split': 'train'}, {'subject': 'bert', 'split': 'test'}]
    """
    path = Path(path)
    expected = f"a header with a column split and {rows} lines, each with split train or test"
    remedy = "Correct the index, or remove it to split the epochs in contiguous runs."
    if not path.is_file():
        _refuse_other_index(path)
        return None
    try:
        header, *lines = _read_table(path)
    except (ValueError, OSError, csv.Error) as error:
        raise DataFileError(path, f"a file that cannot be read ({error})", expected, remedy) from error
    columns = [name.casefold() for name in header]
    if "split" not in columns:
        raise DataFileError(path, f"the columns {', '.join(header) or '(none)'}", expected, remedy)
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise DataFileError(path, f"the column {twice[0]} more than once", "each column once", remedy)
    if len(lines) != rows:
        raise DataFileError(path, f"{len(lines)} lines", expected, remedy)
    index = []
    for number, line in enumerate(lines):
        if len(line) != len(columns):
            raise DataFileError(path, f"another number of entries than columns in row {number}", expected, remedy)
        row = dict(zip(columns, line, strict=True))
        if (split := row["split"].casefold()) not in ("train", "test"):
            raise DataFileError(path, f"split {row['split']!r} in row {number}", expected, remedy)
        index.append({**row, "split": split})
    return index


def _read_table(path: Path) -> list[list[str]]:
    """The header and the lines of a CSV file, entries without blanks around them; lines of blanks are none."""
    data = path.read_bytes()
    text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    first_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first_line.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    stripped = ([entry.strip() for entry in line] for line in table)
    return [line for line in stripped if any(line)] or [[]]


def _refuse_other_index(path: Path) -> None:
    """Refuse to go without an index where there seems to be one, such as `eeg_index.csv` or `EEG_index.xlsx`."""
    names = {path.stem.casefold(), path.name.casefold()}
    others = {other.name for other in path.parent.glob("*") if names & {other.stem.casefold(), other.name.casefold()}}
    if others:
        found = "no file" if path.name in others else f"no such file, but {min(others)}"
        remedy = f"Save it as CSV under the name {path.name}, or take it out of the folder to go without an index."
        raise DataFileError(path, found, "an index of this very name, or none", remedy)
