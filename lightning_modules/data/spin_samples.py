"""Generated samples of a spin glass: ±J couplings on a torus, spins drawn by heat bath."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader
from lightning_modules.solvers.local_fields import local_fields

__all__ = ["SpinSamples", "heat_bath"]

_COUPLINGS, _TRAINING, _VALIDATION = range(3)  # what is drawn from one seed

Batch = tuple[Tensor, Tensor]


@torch.no_grad()
def heat_bath(couplings: Tensor, count: int, sweeps: int, generator: torch.Generator) -> Tensor:
    r"""Draw spins on a torus from :math:`P(s) \propto \exp(\sum_{ij} W_{ij} s_i s_j)`, the sum over edges.

    Every sample is a Markov chain of its own from a random start. A sweep redraws the two halves of the checkerboard
    in turn, each spin from its probability given all others: spins of one half are no neighbours, so that all of them
    are drawn at once. After the last sweep the second half has exactly its conditional distribution given the first;
    how near the first is to equilibrium depends on the number of sweeps, which grows steeply as the couplings do.

    Args:
        couplings: W, shape ``(2, rows, columns)``, as of `local_fields`; rows and columns are even.
        count: of samples.
        sweeps: of each chain.
        generator: of all random numbers.

    Returns:
        -1 or 1, shape ``(count, rows, columns)``.

    Example:
        >>> ferromagnet = torch.full((2, 4, 4), 2.0)
        >>> spins = heat_bath(ferromagnet, count=50, sweeps=100, generator=torch.Generator().manual_seed(0))
        >>> bool(spins.mean((1, 2)).abs().mean() > 0.9)
        True
    """
    rows, columns = couplings.shape[1:]
    sites = torch.arange(rows * columns).reshape(rows, columns)
    neighbours = torch.stack([sites.roll(-1, 1), sites.roll(1, 1), sites.roll(-1, 0), sites.roll(1, 0)])
    right, down = couplings
    strengths = torch.stack([right, right.roll(1, 1), down, down.roll(1, 0)])
    is_odd = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 1
    halves = [
        # The spins have the samples last: a neighbour is a row of contiguous numbers.
        (sites[half], neighbours[:, half], 2 * strengths[:, half].unsqueeze(-1))
        for half in (~is_odd, is_odd)
    ]
    spins = torch.randint(2, (rows * columns, count), generator=generator) * 2.0 - 1.0
    for _ in range(sweeps):
        for own, around, strength in halves:
            probability = torch.sigmoid((strength * spins[around]).sum(0))
            spins[own] = torch.where(torch.rand(probability.shape, generator=generator) < probability, 1.0, -1.0)
    return spins.T.reshape(count, rows, columns).contiguous()


class _SamplesByEpoch(Dataset[Batch]):
    """All samples once in each epoch, in an order that the epoch index alone decides; number ``epoch * length + i``."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch (y, x) of one epoch: the spins twice, to see and to predict."""
        epoch = indices[0] // len(self)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(epoch))
        spins = self.samples[order[[index - epoch * len(self) for index in indices]]]
        return spins, spins


class SpinSamples(pl.LightningDataModule):
    r"""Samples of a spin glass on a torus whose couplings, ±``coupling`` on every edge, are to be found.

    Batches (y, x) of training and validation are (spins, spins), each (batch, size, size): a solver maps the spins to
    local fields, and a `PseudoLikelihoodLoss` compares these with the spins. Nothing in them tells the couplings.

    The test set holds what only the maker of the samples knows. Its inputs are single spins, all others 0; its targets
    the fields that these give their neighbours, which are the couplings. Every coupling occurs twice, once from each of
    its ends, and nothing else does, so that the `NMSE` of the fields is that of the couplings:
    :math:`10 \log_{10}(\lVert \hat W - W \rVert^2 / \lVert W \rVert^2)`.

    Args:
        size: rows and columns of the torus, even and at least 4.
        coupling: λ = βJ, the absolute value of each coupling, the inverse temperature included.
        training_samples: N, all there are to learn from; an epoch goes through them once.
        validation_samples: for the choice of settings, not to learn from.
        batch_size: samples a batch, on each rank; all unless given.
        sweeps: of heat bath behind each sample, from random spins. On 16 × 16 sites the mean energy no longer changes
            (by more than its error of 0.3 %) from 100 sweeps on for couplings up to 0.6, from 1,000 on at 1.0.
        seed: of the couplings and of all samples. Those of a smaller N are no part of those of a larger one.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> data = SpinSamples(size=4, coupling=0.6, training_samples=20, validation_samples=10)
        >>> data.setup()
        >>> spins, target = next(iter(data.train_dataloader()))
        >>> spins.shape, torch.equal(spins, target)
        (torch.Size([20, 4, 4]), True)
    """

    def __init__(
        self,
        size: int = 16,
        coupling: float = 0.6,
        training_samples: int = 40,
        validation_samples: int = 20,
        batch_size: int | None = None,
        sweeps: int = 300,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size < 4 or size % 2:
            raise ValueError(f"size is {size}: rows and columns of the torus are an even number, at least 4")
        if not 0 < coupling < float("inf"):
            raise ValueError(f"coupling is {coupling}: it is β J, positive and finite")
        batch_size = training_samples if batch_size is None else batch_size
        if min(training_samples, validation_samples, sweeps) < 1 or not 1 <= batch_size <= training_samples or seed < 0:
            raise ValueError(
                f"training_samples={training_samples}, validation_samples={validation_samples}, sweeps={sweeps}, "
                f"batch_size={batch_size}, seed={seed}: counts are at least 1, a batch at most all training samples, "
                f"the seed at least 0"
            )
        self.size, self.coupling, self.sweeps, self.seed = size, coupling, sweeps, seed
        self.training_samples, self.validation_samples = training_samples, validation_samples
        self.batch_size = batch_size
        signs = torch.randint(2, (2, size, size), generator=self._generator(_COUPLINGS)) * 2.0 - 1.0
        self.couplings = coupling * signs

    def _generator(self, what: int) -> torch.Generator:
        # torch's generator looks at 32 bits of its seed: mix both numbers into them.
        return torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, what]).generate_state(1)[0]))

    def setup(self, stage: str | None = None) -> None:
        """Draw the samples, once."""
        if stage in ("fit", None) and not hasattr(self, "train_set"):
            training = heat_bath(self.couplings, self.training_samples, self.sweeps, self._generator(_TRAINING))
            self.train_set = _SamplesByEpoch(training)
        if stage in ("fit", "validate", None) and not hasattr(self, "val_set"):
            spins = heat_bath(self.couplings, self.validation_samples, self.sweeps, self._generator(_VALIDATION))
            self.val_set = TensorDataset(spins, spins)
        singles = torch.eye(self.size**2).reshape(-1, self.size, self.size)
        self.test_set = TensorDataset(singles, local_fields(singles, self.couplings))

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of this rank; a last incomplete batch of the epoch is left out."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.training_samples < ranks * self.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size} on {ranks} ranks, but there are {self.training_samples} training "
                f"samples: lower batch_size"
            )
        return ResumableLoader(self.train_set, self.batch_size, EpochSampler(self.training_samples, ranks, rank))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return DataLoader(self.val_set, batch_size=256)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return DataLoader(self.test_set, batch_size=256)  # type: ignore[arg-type]
