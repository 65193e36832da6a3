"""Before any training: how many independent examples bring the bound by codes within a wanted gap, for each scheme."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_modules.analysis.code_length import FLOAT_BITS, CodeLengths, flip_bits
from lightning_modules.analysis.kl_bound import examples_for_gap
from pibinn_plugin.tables import text_table

__all__ = ["Plan"]

FAILURE = 0.05
_TRAIN_LOSSES = (0.0, 0.01, 0.05, 0.1, 0.25)
_FLIPPED = (0.0, 0.01, 0.05)


@dataclass(frozen=True)
class Plan:
    """For each scheme the smallest N for which (bound of the true mean loss) - (train loss) is at most the gap.

    Args:
        lengths: of the network, see `lightning_modules.analysis.code_length.code_lengths`.
        gap: in (0, 1).
        blocks: equal networks side by side.

    Example:
        >>> plan = Plan(CodeLengths(nonzeros=64, rows=1, floats=1), gap=0.1)
        >>> {scheme: counts[1] for scheme, counts in plan.counts().items() if "flips" not in scheme}
        {'one-bit': 854, 'ternary': 1173, 'channel-wise': 854, 'float': 17468}
    """

    lengths: CodeLengths
    gap: float
    blocks: int = 1

    def counts(self) -> dict[str, list[int | None]]:
        """By scheme, N for each train loss."""
        fixed = {scheme: float(bits) for scheme, bits in self.lengths.bits().items() if not bits.dim()}
        floats, n = self.lengths.floats * FLOAT_BITS, self.lengths.nonzeros
        flips = {
            f"one-bit, {fraction:.0%} flips": float(flip_bits(n, torch.tensor(round(fraction * n)))) + floats
            for fraction in _FLIPPED
        }
        return {
            scheme: [examples_for_gap(loss, self.gap, bits, FAILURE, self.blocks) for loss in _TRAIN_LOSSES]
            for scheme, bits in (flips | fixed).items()
        }

    def __str__(self) -> str:
        header = ("weights", *(f"train loss {loss:g}" for loss in _TRAIN_LOSSES))
        rows = [[scheme, *map(_cell, counts)] for scheme, counts in self.counts().items()]
        return (
            f"N for a gap of {self.gap:g}, by the loss on the training examples\n"
            + text_table(header, rows, left_columns=1)
            + f"With probability {1 - FAILURE:g}, the mean loss over the distribution is at most the train loss and "
            f"the gap. Assumed:\nN independent examples; floats of 32 bits. flips: the signs that training changes, of "
            f"{self.lengths.nonzeros:,} in a block;\nthe code tells which.\n"
        )


def _cell(count: int | None) -> str:
    return "none" if count is None else f"{count:,}"
