"""Generated sparse recovery: Bernoulli-Gaussian unknowns, measured by a known operator with white noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader
from lightning_modules.operators import PhysicsOperator

__all__ = ["SparseRecovery"]

# Validation and test examples are the same whatever the seed of the training.
VALIDATION_SEED, TEST_SEED, CALIBRATION_SEED = 20210201, 20210202, 20210203
CALIBRATION_EXAMPLES, CALIBRATION_ENTRIES = 4096, 1 << 24  # of the signals whose power is taken; in all of them

Batch = tuple[Tensor, Tensor]


class _ExamplesByEpoch(Dataset[Batch]):
    """The examples of one epoch after another, from seed and epoch index alone; number ``epoch * length + i``."""

    def __init__(self, data: SparseRecovery, length: int) -> None:
        self.data, self.length = data, length
        self._epoch, self._examples = -1, (torch.empty(0), torch.empty(0))

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch (y, x) of examples of one epoch."""
        epoch = indices[0] // self.length
        if epoch != self._epoch:
            self._epoch, self._examples = epoch, self.data.draw_epoch(self.length, epoch)
        rows = [index - epoch * self.length for index in indices]
        return self._examples[0][rows], self._examples[1][rows]


class SparseRecovery(pl.LightningDataModule):
    """Batches ``(y, x)``: measurements (batch, m) and unknowns (batch, n) with y = A x + noise.

    An unknown is nonzero with probability ``sparsity`` and then standard normal. The noise is white, ``snr_db`` below
    the mean power of A x. Training examples are drawn anew each epoch, from the seed and the epoch index alone, so
    that neither a resumed run nor the number of ranks changes them; validation and test examples are fixed.

    With ``training_pairs`` there are only so many training examples, as in the calibration of an instrument: an epoch
    goes through all of them again and again, each time in another order.

    Args:
        operator: A, with a method ``A`` and a ``shape``.
        sparsity: the fraction of nonzeros.
        snr_db: ratio of the power of A x to that of the noise, in dB.
        batch_size: examples a batch, on each rank.
        train_examples: examples an epoch.
        evaluation_examples: of the validation set, and of the test set.
        seed: of the training examples.
        training_pairs: how many different training examples there are; new ones in each epoch unless given.

    Raises:
        ValueError: an argument out of range; or an operator whose measurements have another shape than it says, are not
            finite, or are zero for the unknowns that are drawn.

    Example:
        >>> from lightning_modules.operators import SignBlocks
        >>> data = SparseRecovery(SignBlocks(blocks=2, rows=4, columns=8), train_examples=256)
        >>> data.setup()
        >>> y, x = next(iter(data.train_dataloader()))
        >>> y.shape, x.shape
        (torch.Size([128, 8]), torch.Size([128, 16]))
    """

    def __init__(
        self,
        operator: PhysicsOperator,
        sparsity: float = 0.1,
        snr_db: float = 40.0,
        batch_size: int = 128,
        train_examples: int = 12_800,
        evaluation_examples: int = 2_000,
        seed: int = 0,
        training_pairs: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < sparsity <= 1:
            raise ValueError(f"sparsity is {sparsity}: it is a fraction, above 0 and at most 1")
        if min(batch_size, train_examples, evaluation_examples) < 1 or seed < 0:
            raise ValueError(
                f"batch_size={batch_size}, train_examples={train_examples}, evaluation_examples={evaluation_examples}, "
                f"seed={seed}: counts are at least 1, the seed at least 0"
            )
        if not snr_db > -math.inf:
            raise ValueError(f"snr_db is {snr_db}: it is a ratio in dB, above -inf; inf is no noise")
        if training_pairs is not None and not 1 <= training_pairs <= train_examples:
            raise ValueError(
                f"training_pairs={training_pairs}: expected at least 1 and at most train_examples={train_examples}, "
                f"the length of an epoch"
            )
        self.training_pairs = training_pairs
        self.operator, self.sparsity, self.snr_db, self.seed = operator, sparsity, snr_db, seed
        self.batch_size, self.train_examples, self.evaluation_examples = batch_size, train_examples, evaluation_examples
        count = min(CALIBRATION_EXAMPLES, max(64, CALIBRATION_ENTRIES // operator.shape[1]))
        signal = operator.A(self._draw_unknowns(count, torch.Generator().manual_seed(CALIBRATION_SEED)))
        if signal.shape != (count, operator.shape[0]) or not signal.isfinite().all() or not signal.any():
            raise ValueError(
                f"A of {type(operator).__name__} maps {count} unknowns of {operator.shape[1]} entries, of which "
                f"sparsity={sparsity} are nonzero, to {tuple(signal.shape)}; expected ({count}, {operator.shape[0]}), "
                f"finite and not zero throughout"
            )
        self.noise_deviation = float(signal.square().mean().sqrt()) * 10 ** (-snr_db / 20)

    def _draw_unknowns(self, count: int, generator: torch.Generator) -> Tensor:
        shape = (count, self.operator.shape[1])
        values = torch.randn(shape, generator=generator)
        return values * (torch.rand(shape, generator=generator) < self.sparsity)

    def draw(self, count: int, seed: int) -> Batch:
        """``count`` examples (y, x) from a seed."""
        generator = torch.Generator().manual_seed(seed)
        x = self._draw_unknowns(count, generator)
        noise = torch.randn((count, self.operator.shape[0]), generator=generator)
        return self.operator.A(x) + self.noise_deviation * noise, x

    @property
    def inputs(self) -> dict[str, str | float]:
        """What a network of this data takes in, for the packed file: measurement vectors of some magnitude."""
        y, _ = self.draw(64, VALIDATION_SEED)
        return {"kind": "measurements", "size": self.operator.shape[0], "deviation": float(y.std())}

    def draw_epoch(self, length: int, epoch: int) -> Batch:
        """The ``length`` training examples (y, x) of an epoch."""
        # torch's generator looks at 32 bits of its seed: mix both numbers into them.
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        if self.training_pairs is None:
            return self.draw(length, seed)
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(length / self.training_pairs)
        order = torch.cat([torch.randperm(self.training_pairs, generator=generator) for _ in range(passes)])[:length]
        y, x = self.fixed_pairs()
        return y[order], x[order]

    def fixed_pairs(self) -> Batch:
        """The ``training_pairs`` examples (y, x) that there are.

        Raises:
            ValueError: training examples are drawn anew each epoch.
        """
        if self.training_pairs is None:
            raise ValueError("training_pairs is None: training examples are drawn anew each epoch")
        return self.draw(self.training_pairs, int(np.random.SeedSequence([self.seed, 1 << 31]).generate_state(1)[0]))

    def setup(self, stage: str | None = None) -> None:
        """Draw the fixed examples."""
        self.val_set = TensorDataset(*self.draw(self.evaluation_examples, VALIDATION_SEED))
        self.test_set = TensorDataset(*self.draw(self.evaluation_examples, TEST_SEED))

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of this rank; a last incomplete batch of the epoch is left out."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.train_examples < ranks * self.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size} on {ranks} ranks, but there are {self.train_examples} training "
                f"examples: lower batch_size"
            )
        examples = _ExamplesByEpoch(self, self.train_examples)
        return ResumableLoader(examples, self.batch_size, EpochSampler(self.train_examples, ranks, rank))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return DataLoader(self.val_set, batch_size=4 * self.batch_size)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return DataLoader(self.test_set, batch_size=4 * self.batch_size)  # type: ignore[arg-type]
