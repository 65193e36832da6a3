r"""How well one-bit weights that were calibrated on pairs predict new pairs: a bound for each row by its own few bits.

A calibrated weight W maps unknowns x to measurements y. The loss of row i on a pair is min(1, (y_i - W_i x)² / E
y²), with E y² the mean over the validation set, to two digits. Row i is told by its signs and λ alone, so that N
pairs bound its true mean loss with `lightning_modules.analysis.kl_bound`, δ spent on all rows in equal parts, and
the mean over rows is bounded by the mean of the bounds. The numbers of the solver around it play no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.analysis.code_length import FLOAT_BITS
from lightning_modules.analysis.examples import training_examples
from lightning_modules.analysis.kl_bound import code_bound
from lightning_modules.analysis.network import CompactWeight
from pibinn_plugin.initialization import SignsFromPairs
from pibinn_plugin.tables import text_table

__all__ = ["ForwardError", "forward_error", "row_bounds"]

FAILURE = 0.05  # δ, of each bound


@dataclass(frozen=True)
class ForwardError:
    """The error of predicted measurements, and what bounds it, by scheme of the weights.

    Args:
        measured: mean loss on the training pairs.
        held_out: mean loss on the test pairs.
        bounds: of the true mean loss, by scheme.
        row_bits: of the longest row, by scheme.
        pairs: N.
        rows: of the weight.
    """

    measured: float
    held_out: float
    bounds: dict[str, float]
    row_bits: dict[str, float]
    pairs: int
    rows: int

    def __str__(self) -> str:
        rows = [[scheme, f"{self.row_bits[scheme]:.0f}", f"{bound:.3f}"] for scheme, bound in self.bounds.items()]
        return text_table(("weights", "bits a row", "true mean at most"), rows, left_columns=1) + (
            f"Measured {self.measured:.4f} on the {self.pairs:,} training pairs, {self.held_out:.4f} on the test set; "
            f"1 is the mean power of y.\nEach entry fails with probability {FAILURE:g} at most. Assumed: independent "
            f"pairs; floats of 32 bits. All schemes are given\nthe measured loss of the one-bit weights. Source: "
            f"analysis/forward_error.py.\n"
        )


def forward_error(
    weight: CompactWeight, scale: float, start: SignsFromPairs, data: pl.LightningDataModule
) -> ForwardError | str:
    """Bound the error of a weight that maps unknowns to measurements, or say why it cannot be bounded.

    Args:
        weight: that was started from pairs.
        scale: λ.
        start: where the pairs are in a batch.
        data: of the training, after ``setup``.
    """
    examples = training_examples(data, epochs=1)
    if isinstance(examples, str):
        return examples
    outputs = torch.cat([start.read(batch)[1] for batch in data.val_dataloader()])
    power = float(f"{outputs.double().square().mean():.1e}")
    losses, held_out = (
        torch.cat([_losses(weight, scale, *start.read(batch), power) for batch in batches])
        for batches in (examples.draw(), data.test_dataloader())
    )
    row_bits = _row_bits(weight.row_nonzeros)
    return ForwardError(
        float(losses.mean()),
        float(held_out.mean()),
        row_bounds(losses.mean(0), weight.row_nonzeros, len(losses)),
        {scheme: float(bits.max()) for scheme, bits in row_bits.items()},
        len(losses),
        losses.shape[1],
    )


def row_bounds(measured: Tensor, nonzeros: Tensor, pairs: int) -> dict[str, float]:
    """Bounds of the true mean loss over all rows, by scheme.

    Args:
        measured: mean loss of each row, shape ``(rows,)``.
        nonzeros: structural nonzeros of each row.
        pairs: N.

    Example:
        >>> bounds = row_bounds(torch.full((256,), 0.0099), torch.full((256,), 64), pairs=300)
        >>> {scheme: round(bound, 3) for scheme, bound in bounds.items()}
        {'one-bit': 0.256, 'ternary': 0.319, 'float': 0.992}
    """
    return {scheme: code_bound(measured, bits, pairs, FAILURE) for scheme, bits in _row_bits(nonzeros).items()}


def _row_bits(nonzeros: Tensor) -> dict[str, Tensor]:
    nonzeros = nonzeros.double()
    return {
        "one-bit": nonzeros + FLOAT_BITS,
        "ternary": nonzeros * math.log2(3) + FLOAT_BITS,
        "float": nonzeros * FLOAT_BITS,
    }


def _losses(weight: CompactWeight, scale: float, inputs: Tensor, outputs: Tensor, power: float) -> Tensor:
    predicted = weight.structure.linear(inputs, scale * weight.signs.to(inputs), weight.shape)
    return ((outputs - predicted).double().square() / power).clamp(max=1)
