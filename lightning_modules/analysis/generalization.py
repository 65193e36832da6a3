r"""How large the loss is on new examples: bounds that hold with a probability that is stated, the tightest first.

The loss of an example is min(1, ‖x̂ - x‖² / ‖x‖²), with the mean of ‖x‖² over the validation set, to two digits, in
place of ‖x‖²: a number that depends neither on the training examples nor on the test examples. It lies in [0, 1],
and the estimate 0 has a loss of nearly 1.

**Held-out examples** bound the loss of this network, whatever its weights are, by their number alone; where
examples come in groups that are alike, such as the epochs of one subject, the groups are what is counted, and the
loss is the mean over groups of the means over their examples.

**Training examples** bound it by the bits that tell the network from all that training could have chosen
(`lightning_modules.analysis.code_length`, `lightning_modules.analysis.kl_bound`): this is where fewer bits are a better
guarantee. Where a network is equal blocks side by side, each of which depends on its part of y alone, each block is a
network of its own, with its own bits and the floats that all share.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.analysis.code_length import CodeLengths, code_lengths
from lightning_modules.analysis.examples import (
    Batch,
    TrainingExamples,
    example_losses,
    held_out_groups,
    mean_power,
    on_device,
    training_examples,
)
from lightning_modules.analysis.kl_bound import code_bound, confidence_interval
from lightning_modules.analysis.local_bound import local_bound
from lightning_modules.analysis.network import CompactWeight, float_parameters, one_bit_weights
from pibinn_plugin.tables import text_table

__all__ = [
    "CodeBounds", "Generalization", "HeldOut", "code_bounds", "generalization", "held_out", "separable_blocks",
]  # fmt: skip

FAILURE = 0.05  # δ, of each bound


@dataclass(frozen=True)
class HeldOut:
    """What examples that training did not see say of one network.

    Args:
        measured: the mean over groups of the mean loss of their examples.
        low: of the interval for the true mean.
        high: of the interval.
        examples: in all groups.
        groups: their number.
        unit: what a group is.
    """

    measured: float
    low: float
    high: float
    examples: int
    groups: int
    unit: str

    def __str__(self) -> str:
        return (
            f"Held out: mean loss {self.measured:.4f} on {self.examples:,} test examples, of {self.groups:,} "
            f"independent {self.unit}.\nThe true mean is between {self.low:.4f} and {self.high:.4f} (width "
            f"{self.high - self.low:.4f}) with probability {1 - FAILURE:g}, whatever the weights are.\n"
        )


@dataclass(frozen=True, eq=False)
class CodeBounds:
    """Bounds of the true mean loss from training examples, by scheme of the weights.

    Args:
        bits: of a block, by scheme.
        losses: mean loss of each block over the training examples by scheme, of its own network where there is one.
        trained: the schemes with a network of their own.
        counts: N, of one epoch and of all.
        source: what the examples are.
        flipped: signs of the whole network that differ from those before training.
    """

    bits: Mapping[str, Tensor]
    losses: Mapping[str, tuple[Tensor, ...]]
    trained: frozenset[str]
    counts: tuple[int, ...]
    source: str
    flipped: int = 0

    def bounds(self, scheme: str) -> list[float]:
        """For each N."""
        pairs = zip(self.losses[scheme], self.counts, strict=True)
        return [code_bound(losses, self.bits[scheme], count, FAILURE) for losses, count in pairs]

    @property
    def tightest(self) -> float:
        """The smallest bound of a network that was trained, for the largest N."""
        return min(self.bounds(scheme)[-1] for scheme in self.trained)

    def local(self, scheme: str) -> float:
        """The local Rademacher bound for the largest N, of as many networks as the bits tell apart."""
        losses = self.losses[scheme][-1].tolist()
        size, share = float(self.bits[scheme]) * math.log(2), FAILURE / len(losses)
        return sum(min(1.0, local_bound(size, self.counts[-1], loss, share)) for loss in losses) / len(losses)

    def __str__(self) -> str:
        order = sorted(self.bits, key=lambda scheme: self.bounds(scheme)[-1])
        header = ("weights", "bits a block", "train loss", *(f"N = {count:,}" for count in self.counts), "local")
        rows = []
        for scheme in order:
            own = f"{self.losses[scheme][-1].mean():.4f}" + ("" if scheme in self.trained else " *")
            numbers = [f"{bound:.3f}" for bound in self.bounds(scheme)]
            local = "" if self.bits[scheme].dim() else f"{self.local(scheme):.3f}"
            rows.append([scheme, f"{float(self.bits[scheme].mean()):,.0f}", own, *numbers, local])
        return text_table(header, rows, left_columns=1)


@dataclass(frozen=True, eq=False)
class Generalization:
    """All that is known of the loss on new examples; ``print`` shows the tightest first.

    Args:
        held_out: from the test set.
        twin: the same of the float twin; None without one.
        code: from the training examples, or why there is no such bound.
        trivial: the mean test loss of the estimate 0.
        power: the mean square of an entry of x that the loss is relative to.
        blocks: equal networks side by side.
    """

    held_out: HeldOut
    twin: HeldOut | None
    code: CodeBounds | str
    trivial: float
    power: float
    blocks: int

    def __str__(self) -> str:
        blocks = f", the mean over {self.blocks} blocks of" if self.blocks > 1 else ","
        held_out = f"{self.held_out}The estimate 0 has {self.trivial:.4f}.\n"
        if self.twin is not None:
            held_out += f"Float twin. {self.twin}"
        if isinstance(self.code, str):
            parts = [held_out, textwrap.fill(f"No bound from training examples: {self.code}.", 116) + "\n"]
        else:
            code = f"From the training examples, the true mean loss is at most\n{self.code}"
            parts = [held_out, code + _LEGEND.format(**vars(self.code), failure=FAILURE)]
            if self.code.tightest < self.held_out.high:
                parts.reverse()
        loss = f"loss: of an example{blocks} min(1, mean squared error / {self.power:g}).\n"
        return "".join([*parts, loss])


_LEGEND = """\
Each entry fails with probability {failure:g} at most. Assumed: N independent examples, of the distribution of new ones
({source}); physics and structure known before; floats of 32 bits. The network may have
been chosen on these examples in any way. *: no such network was trained; it is given the loss of this one.
flips: the code tells which signs differ from those before training: {flipped:,} do. local: the local Rademacher bound
for the largest N, nowhere below the bound by codes (analysis/local_bound.py). Theorem: analysis/kl_bound.py.
"""


def generalization(
    model: nn.Module,
    data: pl.LightningDataModule,
    epochs: int,
    untrained: nn.Module | None = None,
    twin: nn.Module | None = None,
) -> Generalization:
    """Bound the loss of a trained, prepared network on new examples.

    Args:
        model: prepared as a whole, so that λ is counted; any, that maps y to an estimate of x.
        data: of its training, after ``setup``.
        epochs: that the training lasted.
        untrained: the model before its training, prepared: its signs are the prior of the flips.
        twin: the same model with trained float weights.
    """
    weights, run = one_bit_weights(model), on_device(model)
    power = mean_power(data.val_dataloader())
    blocks = separable_blocks(run, weights, data)
    prior = None if untrained is None else one_bit_weights(untrained)
    lengths = code_lengths(weights, float_parameters(model), prior, blocks)
    solvers = {"one-bit": run, **({} if twin is None else {"float": on_device(twin)})}
    examples = training_examples(data, epochs)
    return Generalization(
        held_out(run, data, power, blocks),
        None if twin is None else held_out(solvers["float"], data, power, blocks),
        examples if isinstance(examples, str) else code_bounds(lengths, solvers, examples, power, blocks),
        held_out(lambda y: torch.zeros(()), data, power, blocks).measured,
        power,
        blocks,
    )


def held_out(
    solver: Callable[[Tensor], Tensor], data: pl.LightningDataModule, power: float, blocks: int = 1
) -> HeldOut:
    """The interval for the true mean loss of a solver, from the test set."""
    losses = example_losses(solver, data.test_dataloader(), power, blocks).double().mean(1)
    group, unit = held_out_groups(data)
    means = torch.zeros(int(group.max()) + 1, dtype=torch.float64).scatter_add_(0, group, losses) / group.bincount()
    measured = float(means.mean())
    return HeldOut(measured, *confidence_interval(measured, len(means), FAILURE), len(losses), len(means), unit)


def code_bounds(
    lengths: CodeLengths,
    solvers: Mapping[str, Callable[[Tensor], Tensor]],
    examples: TrainingExamples,
    power: float,
    blocks: int = 1,
) -> CodeBounds:
    """Bound the true mean loss from training examples.

    Args:
        lengths: of the network.
        solvers: by scheme, ``one-bit`` among them.
        examples: independent ones.
        power: see `example_losses`.
        blocks: equal networks side by side.
    """
    counts = tuple(dict.fromkeys((examples.of_one_epoch, examples.count)))
    measured = {}
    for scheme, solver in solvers.items():
        losses = example_losses(solver, examples.draw(), power, blocks).double()
        measured[scheme] = tuple(losses[:count].mean(0) for count in counts)
    bits = lengths.bits()
    # The flips are another code of the same network.
    own = {scheme: measured.get(scheme.removesuffix(", flips"), measured["one-bit"]) for scheme in bits}
    trained = frozenset(scheme for scheme in bits if scheme.removesuffix(", flips") in measured)
    return CodeBounds(
        bits, own, trained, counts, examples.source, 0 if lengths.flipped is None else int(lengths.flipped.sum())
    )


def separable_blocks(
    solver: Callable[[Tensor], Tensor], weights: Iterable[CompactWeight], data: pl.LightningDataModule
) -> int:
    """How many equal networks side by side a solver is: blocks that all weights have, and that do not see each other.

    The second is tried, on a batch of the validation set: whatever is in the other blocks of y, an estimate of a block
    is the same, bit for bit.
    """
    counts = {weight.equal_blocks for weight in weights}
    y, x = _first(data.val_dataloader())
    if len(counts) != 1 or (blocks := counts.pop()) == 1 or y.dim() != 2 or x.dim() != 2:
        return 1
    if y.shape[1] % blocks or x.shape[1] % blocks:
        return 1
    other = y.roll(1, 0).unflatten(1, (blocks, -1))
    with torch.no_grad():
        expected = solver(y).unflatten(1, (blocks, -1))
        for block in {0, blocks - 1}:
            mixed = other.clone()
            mixed[:, block] = y.unflatten(1, (blocks, -1))[:, block]
            if not torch.equal(solver(mixed.flatten(1)).unflatten(1, (blocks, -1))[:, block], expected[:, block]):
                return 1
    return blocks


def _first(batches: Iterable[Batch]) -> Batch:
    return next(iter(batches))
