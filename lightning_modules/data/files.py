"""Reading of data files, none of it through pickle: a bad file is an error that says what is wrong with it."""

from __future__ import annotations

import csv
import tokenize
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["DataFileError", "read_epochs", "read_index"]


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
        super().__init__(f"{path}: found {found}; expected {expected}. {remedy}")
        self.path = path


def read_epochs(path: str | Path, samples: int) -> npt.NDArray[np.float32]:
    """Read an array of epochs from a `.npy` file.

    Args:
        path: The file: epochs by samples, float32 or float64.
        samples: The number of samples an epoch must have.

    Returns:
        The epochs, shape (epochs, samples), float32, all finite and none zero throughout.

    Raises:
        DataFileError: If the file is absent, damaged, of another shape or data type, or holds values that are not
            finite or epochs without a signal.
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
    finite = np.isfinite(epochs).all(axis=1)
    if not finite.all():
        found = f"{np.count_nonzero(~finite)} epochs with NaN or infinite values, the first in row {finite.argmin()}"
        raise DataFileError(path, found, "finite values", "Drop these rows (and their rows of the index).")
    nonzero = epochs.any(axis=1)
    if not nonzero.all():
        found = f"{np.count_nonzero(~nonzero)} epochs that are zero throughout, the first in row {nonzero.argmin()}"
        raise DataFileError(path, found, "a signal in every epoch", "Drop these rows (and their rows of the index).")
    return epochs


def read_index(path: str | Path, rows: int) -> list[dict[str, str]] | None:
    """Read the index of an array of epochs: a CSV file with a header and one line an epoch.

    Args:
        path: The file; its column `split` says `train` or `test`, the others are free.
        rows: The number of epochs it must describe.

    Returns:
        One dict an epoch from column to entry, or None if there is no such file.

    Raises:
        DataFileError: If the file cannot be read, has no column `split`, another number of lines, incomplete lines, or
            a split other than train and test.
    """
    path = Path(path)
    if not path.is_file():
        return None
    expected = f"a header with a column split and {rows} lines, each with split train or test"
    remedy = "Correct the index, or remove it to split the epochs in contiguous runs."
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            index = list(reader)
            columns = reader.fieldnames or []
    except (ValueError, OSError, csv.Error) as error:
        raise DataFileError(path, f"a file that cannot be read ({error})", expected, remedy) from error
    if "split" not in columns:
        raise DataFileError(path, f"the columns {', '.join(columns) or '(none)'}", expected, remedy)
    if len(index) != rows:
        raise DataFileError(path, f"{len(index)} lines", expected, remedy)
    for number, row in enumerate(index):
        # DictReader files surplus entries under None and fills missing ones with None.
        if None in row or None in row.values():
            raise DataFileError(path, f"another number of entries than columns in row {number}", expected, remedy)
        if row["split"] not in ("train", "test"):
            raise DataFileError(path, f"split {row['split']!r} in row {number}", expected, remedy)
    return index
