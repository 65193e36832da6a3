"""EEG with ocular or muscular artifacts, in the file layout of EEGdenoiseNet (Zhang et al., J. Neural Eng. 18, 2021).

A folder holds clean EEG epochs, `EEG_all_epochs.npy`, and artifact epochs, `EOG_all_epochs.npy` or
`EMG_all_epochs.npy`. The noisy epoch is a mixture `y = x + c * a` of an EEG epoch `x` and an artifact epoch `a`, with
`c` set by the signal-to-noise ratio of *power*. EEGdenoiseNet's own code applies `10 ** (dB / 10)` to a ratio of root
mean squares, so its nominal -7 ... 2 dB are the -14 ... +4 dB used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_modules.data.artifact_augmentation import ArtifactAugmentation, Distortions
from lightning_modules.data.epoch_split import TEST_FRACTION, Split, split_rows
from lightning_modules.data.files import read_epochs
from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader, whole_batch

__all__ = ["EEGDenoiseNet", "mix"]

SAMPLES = 512
SAMPLING_RATE = 256.0  # Hz; the epochs of EEGdenoiseNet are of 2 s
EVALUATION_LEVELS_DB = tuple(range(-14, 5, 2))
# Validation and test mixtures are the same whatever the seed of the training.
EVALUATION_SEED = 20210101

Batch = tuple[Tensor, Tensor]


def mix(clean: Tensor, artifact: Tensor, snr_db: Tensor) -> Batch:
    r"""Mix clean epochs with artifacts and divide both sides by the standard deviation of the mixture.

    .. math:: y = x + c\,a, \qquad c = \frac{\mathrm{RMS}(x)}{\mathrm{RMS}(a)}\,10^{-\mathrm{SNR}/20}

    Args:
        clean: EEG epochs x, shape (batch, samples), none flat.
        artifact: Artifact epochs a, the same shape and units, none flat.
        snr_db: Ratio of the power of x to the power of c a, in dB, shape (batch,).

    Returns:
        The noisy epochs y and the clean epochs x, each (batch, samples), both divided by the standard deviation of y.

    Example:
        >>> clean, artifact = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.tensor([[5.0, 5.0, -5.0, -5.0]])
        >>> y, x = mix(clean, artifact, torch.tensor([0.0]))
        >>> y, x
        (tensor([[ 1.4142,  0.0000,  0.0000, -1.4142]]), tensor([[ 0.7071, -0.7071,  0.7071, -0.7071]]))
    """
    ratio = clean.square().mean(dim=1).sqrt() / artifact.square().mean(dim=1).sqrt()
    noisy = clean + (ratio * 10 ** (-snr_db / 20)).unsqueeze(1) * artifact
    deviation = noisy.std(dim=1, correction=0, keepdim=True)
    return noisy / deviation, clean / deviation


class Pairing(NamedTuple):
    """Which EEG epoch meets which artifact epoch at which SNR in dB: three tensors of shape (mixtures,)."""

    clean: Tensor
    artifact: Tensor
    snr_db: Tensor


class FixedMixtures(Dataset[Batch]):
    """Mixtures by a fixed pairing, for validation and test.

    Args:
        clean: EEG epochs, shape (epochs, samples).
        artifacts: Artifact epochs, shape (artifact epochs, samples).
        pairing: The mixtures.
    """

    def __init__(self, clean: Tensor, artifacts: Tensor, pairing: Pairing) -> None:
        self.clean = clean
        self.artifacts = artifacts
        self.pairing = pairing

    def __len__(self) -> int:
        return len(self.pairing.clean)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch (y, x) of mixtures, each (len(indices), samples)."""
        clean, artifact, snr_db = (column[list(indices)] for column in self.pairing)
        return mix(self.clean[clean], self.artifacts[artifact], snr_db)

    def __getitem__(self, index: int) -> Batch:
        y, x = self.__getitems__([index])
        return y[0], x[0]


class FreshMixtures(Dataset[Batch]):
    """Mixtures drawn afresh every epoch from the seed and the epoch index alone.

    In epoch `e` every EEG epoch occurs once, in random order, with a random artifact epoch at an SNR uniform in the
    range, distorted at random where there is an augmentation. Mixture `i` of epoch `e` has the index
    `e * len(self) + i`, as :class:`EpochSampler` counts; one batch belongs to one epoch.

    Args:
        clean: EEG epochs, shape (epochs, samples).
        artifacts: Artifact epochs, shape (artifact epochs, samples).
        snr_range_db: Lowest and highest SNR in dB.
        seed: Seed of all draws.
        augmentation: Of the artifacts.
    """

    def __init__(
        self,
        clean: Tensor,
        artifacts: Tensor,
        snr_range_db: tuple[float, float],
        seed: int,
        augmentation: ArtifactAugmentation | None = None,
    ) -> None:
        self.clean = clean
        self.artifacts = artifacts
        self.snr_range_db = snr_range_db
        self.seed = seed
        self.augmentation = augmentation
        self._current: tuple[int, Pairing, Distortions | None] | None = None

    def __len__(self) -> int:
        return len(self.clean)

    def pairing(self, epoch: int) -> Pairing:
        """Return the mixtures of an epoch in their order."""
        random = np.random.default_rng([self.seed, epoch])
        return Pairing(
            torch.from_numpy(random.permutation(len(self.clean))),
            torch.from_numpy(random.integers(len(self.artifacts), size=len(self.clean))),
            torch.from_numpy(random.uniform(*self.snr_range_db, size=len(self.clean)).astype(np.float32)),
        )

    def distortions(self, epoch: int) -> Distortions | None:
        """Return what is done to the artifact of each mixture of an epoch."""
        if self.augmentation is None:
            return None
        random = np.random.default_rng([self.seed, epoch, 1])
        return self.augmentation.draw(random, len(self.clean), *self.artifacts.shape)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch (y, x) of mixtures of one epoch, each (len(indices), samples)."""
        epoch = indices[0] // len(self)
        if self._current is None or self._current[0] != epoch:
            self._current = epoch, self.pairing(epoch), self.distortions(epoch)
        _, pairing, distortions = self._current
        rows = [index - epoch * len(self) for index in indices]
        clean, artifact, snr_db = (column[rows] for column in pairing)
        if self.augmentation is None or distortions is None:
            artifacts = self.artifacts[artifact]
        else:
            artifacts = self.augmentation(self.artifacts, artifact, distortions.of(rows), SAMPLING_RATE)
        return mix(self.clean[clean], artifacts, snr_db)

    def __getitem__(self, index: int) -> Batch:
        y, x = self.__getitems__([index])
        return y[0], x[0]


class EEGDenoiseNet(pl.LightningDataModule):
    """Denoising of EEG epochs: batches `(y, x)` of noisy and clean epochs, each (batch, 512) float32.

    Training mixtures are drawn afresh every epoch, from `seed` and the epoch index only: neither the global random
    state nor the number of ranks nor a resumed run changes them, provided `batch_size` times the number of ranks stays
    the same. Validation and test mixtures are fixed, in equal numbers at -14, -12, ... +4 dB, so a mean over them is
    the mean over the levels: every validation epoch at one level, every test epoch at all ten. Both y and x are divided
    by the standard deviation of y, as EEGdenoiseNet does.

    Epochs are split by the column `split` of `EEG_index.csv` and of the artifact's index where these exist, with whole
    subjects and recordings held out of training for validation; otherwise in contiguous runs of 80, 10 and 10 %. With
    `val_source`, validation has the artifacts of a whole source instead: how well a training carries over to recordings
    of another laboratory shows only there.
    `setup` prints once what was read of each file and how it was split.

    Args:
        data_dir: Folder of the files. Arrays are (epochs, 512), float32 or float64.
        artifact: "EOG" (eyes) or "EMG" (muscles).
        snr_range_db: Lowest and highest SNR of the training mixtures, in dB of power.
        batch_size: Mixtures a batch, on each rank.
        val_fraction: Fraction of the training subjects and recordings that validation holds out.
        seed: Seed of the training mixtures.
        augmentation: How training artifacts are distorted at random; not at all unless given.
        val_source: Source of the artifact index, such as a laboratory, whose recordings are all held out of training
            and, but for those of the test set, validated on.

    Raises:
        ValueError: If an argument is out of range.
        DataFileError: By `setup`, if a file is absent or does not hold what it should.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> for kind in ("EEG", "EOG"):
        ...     epochs = np.random.default_rng(0).standard_normal((100, 512), dtype=np.float32)
        ...     np.save(f"{folder.name}/{kind}_all_epochs.npy", epochs)
        >>> data = EEGDenoiseNet(folder.name, batch_size=32)
        >>> data.setup("fit")
        >>> y, x = next(iter(data.train_dataloader()))
        >>> y.shape, x.shape
        (torch.Size([32, 512]), torch.Size([32, 512]))
    """

    def __init__(
        self,
        data_dir: str | Path,
        artifact: Literal["EOG", "EMG"] = "EOG",
        snr_range_db: tuple[float, float] = (-14.0, 4.0),
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        augmentation: ArtifactAugmentation | None = None,
        val_source: str | None = None,
    ) -> None:
        super().__init__()
        if artifact not in ("EOG", "EMG"):
            raise ValueError(f"artifact is {artifact!r}: it must be 'EOG' or 'EMG'.")
        if len(snr_range_db) != 2 or not -math.inf < snr_range_db[0] <= snr_range_db[1] < math.inf:
            raise ValueError(f"snr_range_db is {snr_range_db}: it must be (lowest, highest) in dB, both finite.")
        if not 0 < val_fraction < 1 - TEST_FRACTION:
            raise ValueError(f"val_fraction is {val_fraction}: it must lie between 0 and {1 - TEST_FRACTION}.")
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size is {batch_size} and seed is {seed}: they must be at least 1 and 0.")
        self.data_dir = Path(data_dir)
        self.artifact = artifact
        self.snr_range_db = snr_range_db
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.augmentation, self.val_source = augmentation, val_source

    @property
    def inputs(self) -> dict[str, str | float]:
        """What a network of this data takes in, for the packed file: windows divided by their standard deviation."""
        return {
            "kind": "signal",
            "sampling_rate": SAMPLING_RATE,
            "unit": "µV",
            "window": SAMPLES,
            "normalisation": "deviation",
        }

    def setup(self, stage: str | None = None) -> None:
        """Read and split the files, once."""
        if hasattr(self, "train_set"):
            return
        clean, clean_split = self._read("EEG", None)
        artifacts, artifact_split = self._read(self.artifact, self.val_source)
        self.train_set = FreshMixtures(
            clean[clean_split.train],
            artifacts[artifact_split.train],
            self.snr_range_db,
            self.seed,
            self.augmentation,
        )
        self.val_set = _validation_mixtures(clean[clean_split.val], artifacts[artifact_split.val])
        self.test_set = _test_mixtures(clean[clean_split.test], artifacts[artifact_split.test])
        rank_zero_info(
            f"Mixtures of EEG and {self.artifact}: {len(self.train_set)} an epoch in training, {len(self.val_set)} in "
            f"validation, {len(self.test_set)} in test."
        )

    def _read(self, kind: str, val_source: str | None) -> tuple[Tensor, Split]:
        path = self.data_dir / f"{kind}_all_epochs.npy"
        epochs = read_epochs(path, SAMPLES)
        split = split_rows(self.data_dir / f"{kind}_index.csv", len(epochs), kind, self.val_fraction, val_source)
        rank_zero_info(f"{path}: {split}")
        return torch.from_numpy(epochs), split

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of this rank; a last incomplete batch of the epoch is left out."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if len(self.train_set) < ranks * self.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size} on {ranks} ranks, but there are {len(self.train_set)} training "
                "epochs: lower batch_size."
            )
        return ResumableLoader(self.train_set, self.batch_size, EpochSampler(len(self.train_set), ranks, rank))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return self._fixed_batches(self.val_set)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return self._fixed_batches(self.test_set)

    def _fixed_batches(self, mixtures: FixedMixtures) -> DataLoader[Batch]:
        # Without gradients a batch needs little memory, and the metrics do not depend on its size.
        return DataLoader(mixtures, batch_size=4 * self.batch_size, num_workers=0, collate_fn=whole_batch)


def _validation_mixtures(clean: Tensor, artifacts: Tensor) -> FixedMixtures:
    """Give every epoch one level in turn; up to nine last epochs are left out for equal counts."""
    levels = torch.tensor(EVALUATION_LEVELS_DB, dtype=torch.float32)
    count = max(len(clean) // len(levels), 1) * len(levels)
    return _evaluation_mixtures(clean, artifacts, torch.arange(count) % len(clean), levels.repeat(count // len(levels)))


def _test_mixtures(clean: Tensor, artifacts: Tensor) -> FixedMixtures:
    """Give every epoch all levels, each with another artifact epoch."""
    levels = torch.tensor(EVALUATION_LEVELS_DB, dtype=torch.float32)
    rows = torch.arange(len(clean)).repeat(len(levels))
    return _evaluation_mixtures(clean, artifacts, rows, levels.repeat_interleave(len(clean)))


def _evaluation_mixtures(clean: Tensor, artifacts: Tensor, rows: Tensor, snr_db: Tensor) -> FixedMixtures:
    drawn = np.random.default_rng(EVALUATION_SEED).integers(len(artifacts), size=len(rows))
    return FixedMixtures(clean, artifacts, Pairing(rows, torch.from_numpy(drawn), snr_db))
