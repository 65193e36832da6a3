"""The split of EEG and artifact epochs into training, validation and test, without a subject or recording in two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_modules.data.files import DataFileError, read_index

__all__ = ["TEST_FRACTION", "Split", "groups_of", "split_rows"]

TEST_FRACTION = 0.1
# Epochs of one subject or recording are alike: these columns of an index name what must not be torn apart.
GROUP_COLUMNS = {"EEG": ("subject",), "EOG": ("source", "record"), "EMG": ("source", "record")}
GROUP_NAMES = {"EEG": "subjects", "EOG": "recordings", "EMG": "recordings"}

Group = tuple[float | str, ...]


@dataclass(frozen=True)
class Split:
    """Row numbers of the epochs of each part, ascending.

    Args:
        train: int64, of training.
        val: int64, of validation.
        test: int64, of test.
        source: What the rows were split by, and the number of groups in each part where there are groups.
    """

    train: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    source: str

    def __str__(self) -> str:
        rows = len(self.train) + len(self.val) + len(self.test)
        return (
            f"{rows} epochs, {len(self.train)} for training, {len(self.val)} for validation, {len(self.test)} for "
            f"test, {self.source}."
        )


def split_rows(path: Path, rows: int, kind: str, val_fraction: float, val_source: str | None = None) -> Split:
    """Split the rows of an array of epochs, by its index where there is one and in contiguous runs otherwise.

    With an index, the test rows are those it says, and the validation rows are whole groups of train rows (subjects of
    EEG, recordings of artifacts), evenly spaced in the order of the file: the same for every seed. Names that differ in
    case only, and numbers of one value (`1`, `01`, `1.0`), are of one group.

    Args:
        path: The index file, which need not exist.
        rows: Number of epochs.
        kind: "EEG", "EOG" or "EMG".
        val_fraction: Fraction of the groups, or of the rows, that is held out of training.
        val_source: Held out instead: the groups of this source, an entry of the column `source`. Test rows stay.

    Returns:
        The rows of each part, none empty.

    Raises:
        DataFileError: If the index is bad, has no column for the groups or a row without an entry in it, has a group
            in both train and test, or leaves a part empty, has no such source, or if there are too few rows to split.
    """
    index = read_index(path, rows)
    if val_source is not None and (index is None or not _is_of(val_source, index).any()):
        found = "no index" if index is None else f"no source {val_source!r}"
        raise DataFileError(path, found, "a column source with the val_source", "Correct the index, or val_source.")
    if index is None:
        val, test = round(rows * (1 - TEST_FRACTION - val_fraction)), round(rows * (1 - TEST_FRACTION))
        source = f"in contiguous runs: there is no {path.name}"
        split = Split(np.arange(val), np.arange(val, test), np.arange(test, rows), source)
    else:
        groups = groups_of(path, index, kind)
        is_test = np.array([row["split"] == "test" for row in index])
        train_groups = _train_groups(path, groups, is_test, GROUP_NAMES[kind])
        if val_source is None:
            held_out = _evenly_spaced(train_groups, val_fraction)
        else:
            held_out = {groups[row] for row in np.flatnonzero(_is_of(val_source, index))}
        is_val = np.array([group in held_out for group in groups]) & ~is_test
        parts = [np.flatnonzero(part) for part in (~is_test & ~is_val, is_val, is_test)]
        numbers = [len({groups[row] for row in part}) for part in parts]
        source = f"by {path.name}, of {numbers[0]}, {numbers[1]} and {numbers[2]} {GROUP_NAMES[kind]}"
        split = Split(parts[0], parts[1], parts[2], source)
    for name in ("train", "val", "test"):
        if len(getattr(split, name)) == 0:
            found = f"{rows} epochs of which none is left for {name}"
            expected = "at least two groups (subjects or recordings) to train on and one epoch to test on"
            raise DataFileError(path, found, expected, "Add epochs, or correct the index.")
    return split


def groups_of(path: Path, index: Sequence[dict[str, str]], kind: str) -> list[Group]:
    """The subject or recording of each row of an index. Raises as `split_rows` does."""
    columns = [column for column in GROUP_COLUMNS[kind] if column in index[0]]
    expected = f"a column {' or '.join(GROUP_COLUMNS[kind])} with an entry for each epoch"
    if not columns:
        remedy = f"Add it: {GROUP_NAMES[kind]} must not be in two parts. Or remove the index."
        raise DataFileError(path, f"the columns {', '.join(index[0])}", expected, remedy)
    groups: list[Group] = []
    for number, row in enumerate(index):
        for column in columns:
            if row[column].casefold() in ("", "nan", "none", "null", "na", "n/a"):
                found = f"{row[column] or 'nothing'} as {column} in row {number}"
                raise DataFileError(path, found, expected, "Complete the index.")
        groups.append(tuple(_identity(row[column]) for column in columns))
    return groups


def _identity(entry: str) -> float | str:
    """The number that an entry says, or its text in lower case: spreadsheets write one subject in several ways."""
    return float(entry) if re.fullmatch(r"[0-9]+(\.[0-9]*)?", entry) else entry.casefold()


def _is_of(source: str, index: Sequence[dict[str, str]]) -> npt.NDArray[np.bool_]:
    """Whether each row of an index is of a source."""
    return np.array([_identity(row.get("source", "")) == _identity(source) for row in index])


def _train_groups(path: Path, groups: Sequence[Group], is_test: npt.NDArray[np.bool_], name: str) -> list[Group]:
    """The groups of the rows that are not of the test, in the order of the file."""
    first_test = {group: row for row, group in reversed(list(enumerate(groups))) if is_test[row]}
    train_groups = list(dict.fromkeys(group for row, group in enumerate(groups) if not is_test[row]))
    if torn := [group for group in train_groups if group in first_test]:
        rows = [row for row, group in enumerate(groups) if group == torn[0] and not is_test[row]]
        found = f"{name} in both train and test, such as that of the rows {rows[0]} and {first_test[torn[0]]}"
        raise DataFileError(path, found, f"{name} in one of the two", "Correct the index.")
    return train_groups


def _evenly_spaced(groups: Sequence[Group], fraction: float) -> set[Group]:
    count = max(1, round(fraction * len(groups))) if groups else 0
    return {groups[int((number + 0.5) * len(groups) / count)] for number in range(count)}
