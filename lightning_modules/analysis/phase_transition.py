r"""How many pairs find the signs of a ±1 operator: predicted for the box relaxation, beside what was measured.

A row s ∈ {-1, 1}^n is to be found from N pairs y = λ s · x + noise by minimising Σ (y - v · x)² over |v| ≤ λ. For
inputs x with independent normal entries, N / n = κ, and both large, the fraction of right signs of the solution is

.. math:: \Phi(1 / \tau), \qquad \kappa \tau^2 = \sigma^2 + E\,(\mathrm{clip}(1 + \tau h, -1, 1) - 1)^2,

with h standard normal and σ² the power of the noise over that of λ s · x (Thrampoulidis, Abbasi, Xu and Hassibi, "BER
analysis of the box relaxation for BPSK signal recovery", arXiv 1510.01413, Theorem 2.1, whose τ minimises

.. math:: \frac{\tau}{2}\left(\kappa - \frac12\right) + \frac{\sigma^2}{2 \tau} + \frac{\tau}{2}
    \int_{2/\tau}^{\infty} \left(h - \frac{2}{\tau}\right)^2 \varphi(h)\, dh;

the equation above is that its derivative is zero). The expectation is τ² (1/2 - Q₂) + 4 Q with Q = P(h > 2/τ) and
Q₂ = E h² 1(h > 2/τ) = (2/τ) φ(2/τ) + Q. Without noise the transition is at κ = 1/2, which
`pibinn_plugin.initialization.sign_recovery` has for finite n. The prediction is for large n and inputs without
zeros: it is good below the transition and optimistic near it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.data.sparse_recovery import SparseRecovery
from pibinn_plugin.initialization.sign_recovery import signs_determined
from pibinn_plugin.initialization.sign_regression import PairStatistics, box_weights, one_bit_start
from pibinn_plugin.structure import Shape, Structure
from pibinn_plugin.tables import text_table

__all__ = ["PairCurve", "measure_signs", "sign_accuracy"]

_SEEDS = range(3)  # of the pairs that are drawn


def sign_accuracy(pairs: float, unknowns: int, noise: float) -> float:
    """The predicted fraction of right signs of the box relaxation: the formula above.

    Args:
        pairs: N, above 0.
        unknowns: n.
        noise: σ², above 0: 0.01 at 20 dB.

    Example:
        >>> [round(sign_accuracy(pairs, 64, 0.01), 4) for pairs in (20, 30, 40)]
        [0.7206, 0.8395, 0.9998]
    """
    low, high = 1e-9, 1e9  # of τ: what has to vanish is negative at the one end and positive at the other
    for _ in range(200):
        middle = math.sqrt(low * high)
        above = pairs / unknowns * middle**2 > noise + _clipped_error(middle)
        low, high = (low, middle) if above else (middle, high)
    return 1 - _tail(1 / low)


def _clipped_error(deviation: float) -> float:
    """E (clip(1 + τ h, -1, 1) - 1)²."""
    edge = 2 / deviation
    tail = _tail(edge)
    outside = edge * math.exp(-(edge**2) / 2) / math.sqrt(2 * math.pi) + tail
    return deviation**2 * (0.5 - outside) + 4 * tail


def _tail(h: float) -> float:
    return math.erfc(h / math.sqrt(2)) / 2


@dataclass(frozen=True)
class PairCurve:
    """The fraction of right signs by the number of pairs, predicted and measured; ``print`` shows it as a table.

    Args:
        pairs: N of each point.
        unknowns: n, of a row.
        noise: σ².
        box: measured, of the box relaxation.
        start: measured, of `SignsFromPairs`.
        all_right: the fraction of rows of which it has all signs.
    """

    pairs: tuple[int, ...]
    unknowns: int
    noise: float
    box: tuple[float, ...]
    start: tuple[float, ...]
    all_right: tuple[float, ...]

    def __str__(self) -> str:
        predicted = [sign_accuracy(n, self.unknowns, self.noise) for n in self.pairs]
        determined = [signs_determined(n, self.unknowns) for n in self.pairs]
        rows = [
            [str(n), *(f"{fraction:.4f}" for fraction in fractions)]
            for n, *fractions in zip(
                self.pairs, predicted, self.box, self.start, determined, self.all_right, strict=True
            )
        ]
        header = ("pairs N", "predicted", "box", "SignsFromPairs", "rows determined", "rows all right")
        return text_table(header, rows) + (
            f"Fraction of right signs, rows of {self.unknowns} unknowns; measured against the true operator, mean of "
            f"{len(_SEEDS)} sets of pairs.\npredicted: for the box relaxation with normal inputs and large n (arXiv "
            "1510.01413), optimistic near the transition\nand for inputs with zeros. rows determined: the probability "
            "that N pairs without noise leave one solution in the box\n"
            "(pibinn_plugin/initialization/sign_recovery.py). rows all right: of which SignsFromPairs has all signs.\n"
        )


def measure_signs(
    data: SparseRecovery, structure: Structure, shape: Shape, counts: Sequence[int] | None = None
) -> PairCurve:
    """Draw pairs of an operator of ±λ and compare the signs found with its own.

    Args:
        data: with the true operator.
        structure: of the weight that stands for the operator.
        shape: of the dense weight.
        counts: N of each point; from a fifth of the unknowns of a row to three halves of them unless given.

    Example:
        >>> from lightning_modules.operators import SignBlocks
        >>> from pibinn_plugin.structure import BlockDiagonal
        >>> data = SparseRecovery(SignBlocks(2, 8, 16), snr_db=40.0)
        >>> measure_signs(data, BlockDiagonal(2), (16, 32), counts=[200]).start
        (1.0,)
    """
    truth = structure.to_compact(data.operator.A(torch.eye(shape[1])).T).sign()
    rows = structure.positions(shape) // shape[1]
    unknowns = int(torch.bincount(rows).max())
    counts = counts or sorted({max(1, round(unknowns * part / 20)) for part in (4, 6, 8, 10, 12, 14, 16, 20, 30)})
    points = torch.stack([_measured(data, structure, shape, truth, rows, count) for count in counts])
    box, start, whole = (tuple(column.tolist()) for column in points.T)
    return PairCurve(tuple(counts), unknowns, 10 ** (-data.snr_db / 10), box, start, whole)


def _measured(
    data: SparseRecovery, structure: Structure, shape: Shape, truth: Tensor, rows: Tensor, count: int
) -> Tensor:
    found = []
    for seed in _SEEDS:
        y, x = data.draw(count, 7919 * (seed + 1) + count)
        statistics = PairStatistics(structure, shape)
        statistics.add(x, y)
        right = [solve(statistics).latent.sign() == truth for solve in (box_weights, one_bit_start)]
        wrong_in_row = torch.bincount(rows, weights=(~right[1]).flatten().double())
        found.append(torch.tensor([*(signs.double().mean() for signs in right), (wrong_in_row == 0).double().mean()]))
    return torch.stack(found).mean(0)
