"""Which examples of a data module are independent, and what of them the bounds may count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.data.bsds500 import BSDS500
from lightning_modules.data.eegdenoisenet import EEGDenoiseNet
from lightning_modules.data.epoch_split import groups_of
from lightning_modules.data.files import read_index
from lightning_modules.data.sparse_recovery import SparseRecovery

__all__ = ["Batch", "TrainingExamples", "example_losses", "held_out_groups", "mean_power", "training_examples"]

Batch = tuple[Tensor, Tensor]

_CHUNK = 1 << 22  # entries of the unknowns that a solver gets at a time


@dataclass(frozen=True)
class TrainingExamples:
    """Independent examples of the distribution that a network was trained on, each once.

    Args:
        draw: all batches (y, x), in the order of the epochs.
        count: N.
        of_one_epoch: how many of the first belong to the first epoch.
        source: what they are.
    """

    draw: Callable[[], Iterator[Batch]]
    count: int
    of_one_epoch: int
    source: str


def training_examples(data: pl.LightningDataModule, epochs: int) -> TrainingExamples | str:
    """The examples of a training, or why they are not independent.

    Where examples are drawn anew in each epoch, those of all epochs count: they are independent of each other, and the
    code of a network (`lightning_modules.analysis.code_length`) is fixed before all of them. An example that the
    optimizer did not see, such as one of an incomplete batch, is an example like any other.

    Args:
        data: of the training.
        epochs: that the training lasted, the current one among them.

    Example:
        >>> from lightning_modules.operators import SignBlocks
        >>> data = SparseRecovery(SignBlocks(2, 4, 8), train_examples=256)
        >>> found = training_examples(data, epochs=3)
        >>> found.count, [len(y) for y, x in found.draw()]
        (768, [256, 256, 256])
    """
    if isinstance(data, SparseRecovery):
        if data.training_pairs is not None:
            pairs = data.training_pairs
            return TrainingExamples(lambda: iter([data.fixed_pairs()]), pairs, pairs, "the training pairs")
        length = data.train_examples
        return TrainingExamples(
            lambda: (data.draw_epoch(length, epoch) for epoch in range(epochs)),
            length * epochs,
            length,
            f"drawn anew in each epoch; epochs: {epochs}",
        )
    if isinstance(data, EEGDenoiseNet):
        return (
            "epochs of one subject are alike, and each is mixed again and again: training examples are not independent"
        )
    if isinstance(data, BSDS500):
        return "patches of one image are alike, and are drawn again and again: training examples are not independent"
    return f"nothing is known of the examples of {type(data).__name__}: whether they are independent cannot be said"


def held_out_groups(data: pl.LightningDataModule) -> tuple[Tensor, str]:
    """The group of each test example, as an integer, and what the groups are; groups are independent of each other.

    Args:
        data: after ``setup``.

    Example:
        >>> from lightning_modules.operators import SignBlocks
        >>> data = SparseRecovery(SignBlocks(2, 4, 8), evaluation_examples=3)
        >>> data.setup()
        >>> held_out_groups(data)
        (tensor([0, 1, 2]), 'examples')
    """
    count = len(data.test_set)  # type: ignore[attr-defined]  # the data modules of this project have one
    if isinstance(data, EEGDenoiseNet):
        path = data.data_dir / "EEG_index.csv"
        rows = len(data.train_set.clean) + len(data.val_set.clean) + len(data.test_set.clean)
        if (index := read_index(path, rows)) is not None:
            groups = zip(index, groups_of(path, index, "EEG"), strict=True)
            subjects = [subject for row, subject in groups if row["split"] == "test"]
            numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
            of_epoch = torch.tensor([numbers[subject] for subject in subjects])
            return of_epoch[data.test_set.pairing.clean], "subjects (the artifacts taken as given)"
        epoch = data.test_set.pairing.clean
        return torch.zeros_like(epoch), "group (no index names the subjects)"
    return torch.arange(count), "images" if isinstance(data, BSDS500) else "examples"


def mean_power(batches: Iterable[Batch]) -> float:
    """The mean square of an entry of x, to two digits: the loss of the estimate 0, before it is cut to 1."""
    total, count = 0.0, 0
    for _, x in batches:
        total, count = total + float(x.double().square().sum()), count + x.numel()
    return float(f"{total / count:.1e}")


@torch.no_grad()
def example_losses(
    solver: Callable[[Tensor], Tensor], batches: Iterable[Batch], power: float, blocks: int = 1
) -> Tensor:
    """min(1, mean squared error / power) of each example and of each of its equal blocks, shape ``(examples, blocks)``.

    Args:
        solver: y to an estimate of x.
        batches: (y, x).
        power: of an entry of x.
        blocks: equal parts of x, one after another.

    Example:
        >>> example_losses(lambda y: y, [(torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.1]]))], 1.0, blocks=2)
        tensor([[1.0000, 0.0050]])
    """
    found = []
    for batch in batches:
        size = max(1, _CHUNK // batch[1][0].numel())
        for y, x in zip(*(part.split(size) for part in batch), strict=True):
            error = (solver(y) - x).flatten(1).unflatten(1, (blocks, -1)).square().mean(-1) / power
            # What is not finite is a loss like the largest.
            found.append(error.nan_to_num(1.0, 1.0).clamp(max=1))
    return torch.cat(found)


def on_device(solver: nn.Module) -> Callable[[Tensor], Tensor]:
    """The solver as a map of float32 tensors on the CPU."""
    parameter: Any = next(solver.parameters())
    return lambda y: solver(y.to(parameter)).float().cpu()
