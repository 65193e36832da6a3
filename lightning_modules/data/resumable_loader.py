"""A training loader whose batches depend on the epoch index and on the position in the epoch, and on nothing else.

A data set that draws its examples afresh every epoch needs to know the epoch. :class:`EpochSampler` tells it through
the index: example `i` of epoch `e` is number `e * length + i`. :class:`ResumableLoader` keeps the position in the epoch
in checkpoints, so that a run killed anywhere resumes with the batch that comes next.

torchdata's ``StatefulDataLoader`` was tried in its place (0.11): it keeps its position whatever the epoch, so that a run
killed between its last step of an epoch and the next epoch resumes without batches, where the tests here kill it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

__all__ = ["EpochSampler", "ResumableLoader", "whole_batch"]


class EpochSampler(DistributedSampler[int]):
    """Indices of one epoch after another, dealt out to the ranks in turn.

    With `r` ranks and `n` examples a batch, the batches number `k` of all ranks together are batch `k` of one rank with
    `r * n` examples a batch. Lightning calls `set_epoch` and leaves a DistributedSampler as it is.

    Args:
        length: Examples an epoch.
        num_replicas: Number of ranks.
        rank: This rank.

    Example:
        >>> sampler = EpochSampler(6, num_replicas=2, rank=1)
        >>> sampler.set_epoch(10)
        >>> list(sampler)
        [61, 63, 65]
    """

    def __init__(self, length: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(length), num_replicas, rank, shuffle=False, drop_last=True)  # type: ignore[arg-type]
        self.length = length
        self.first = 0

    def __iter__(self) -> Iterator[int]:
        first, self.first = self.first, 0
        for position in list(super().__iter__())[first:]:
            yield self.epoch * self.length + position


class ResumableLoader(DataLoader[Any]):
    """A loader of whole batches in the order of an :class:`EpochSampler`, with its position as state.

    It reads in the main process: the position is that of the batches handed out, and workers read ahead.

    Args:
        dataset: A data set with `__getitems__`, which returns the whole batch for a list of indices.
        batch_size: Examples a batch; a last incomplete batch is left out.
        sampler: The order.

    Example:
        >>> class Squares(Dataset):
        ...     def __getitems__(self, indices):
        ...         return [index**2 for index in indices]
        >>> loader = ResumableLoader(Squares(), batch_size=2, sampler=EpochSampler(5))
        >>> loader.load_state_dict({"epoch": 0, "batches": 1})
        >>> list(loader)
        [[4, 9]]
    """

    sampler: EpochSampler

    def __init__(self, dataset: Dataset[Any], batch_size: int, sampler: EpochSampler) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=True,
            num_workers=0,
            collate_fn=whole_batch,
            # A loader draws a seed for its workers: not from the global random state.
            generator=torch.Generator(),
        )
        self._position = {"epoch": -1, "batches": 0}
        self._resume = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: these lines run with the first batch, when Lightning has told the sampler the epoch.
        if not self._resume or self._position["epoch"] != self.sampler.epoch:
            self._position = {"epoch": self.sampler.epoch, "batches": 0}
        self._resume = False
        self.sampler.first = self._position["batches"] * (self.batch_size or 1)
        for batch in super().__iter__():
            self._position["batches"] += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch last read and the number of its batches handed out."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin that epoch, if it is the next to be read, after the batches already handed out."""
        self._position = dict(state_dict)
        self._resume = True


def whole_batch(batch: Any) -> Any:
    """Collate function for a data set whose `__getitems__` returns a whole batch: return it as it is."""
    return batch
