"""A small data set in the file layout of EEGdenoiseNet."""

import csv

import numpy as np

from lightning_modules.data.eegdenoisenet import EEGDenoiseNet

EEG_SUBJECTS, EOG_RECORDS, ROWS_EACH = 20, 10, 6


def write_index(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def epochs_marked_by_row(count, seed):
    """Random epochs whose first sample is the number of the row, so that a mixture tells where it came from."""
    epochs = np.random.default_rng(seed).standard_normal((count, 512), dtype=np.float32)
    epochs[:, 0] = np.arange(1, count + 1)
    return epochs


def write_small_data_set(folder):
    """A small data set with indices: every fifth subject and record is for test."""
    for kind, groups in (("EEG", EEG_SUBJECTS), ("EOG", EOG_RECORDS)):
        count = groups * ROWS_EACH
        np.save(folder / f"{kind}_all_epochs.npy", epochs_marked_by_row(count, groups))
        # Interleaved: the rows of one group do not follow one another.
        numbers = [row % groups for row in range(count)]
        columns = {"EEG": "subject", "EOG": "record"}
        rows = [{columns[kind]: n, "source": "here", "split": "train" if n % 5 else "test"} for n in numbers]
        write_index(folder / f"{kind}_index.csv", rows)


def loaded(folder, **arguments):
    data = EEGDenoiseNet(folder, **{"batch_size": 8, **arguments})
    data.setup()
    return data
