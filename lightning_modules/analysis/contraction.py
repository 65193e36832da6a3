r"""Spectral contraction of an unrolled iteration, and for how many nonzeros one-bit weights can contract at all.

**Spectral.** For every nonexpansive proximal map P, x ↦ P(x + g W (y - A x)) is Lipschitz with the constant
‖I - g W A‖₂: two inputs x, x' come as near as (I - g W A)(x - x'). Where A has fewer rows than columns this is never
below 1, whatever W is: I - g W A is the identity on the null space of A. Such problems contract on sparse vectors only,
which is what `lightning_modules.analysis.convergence` certifies, by the condition ρ(s) + s μ < 1.

**Existence.** Let W = λ S with all of a block structural and S = ±1, and let c = g λ. With a_j = S_j · A_j the
correlation of row j with its own column, b = max_{i ≠ j} |S_i · A_j|, and o_j(s) the sum of the s - 1 largest
|S_i · A_j| over i ≠ j, the condition is, for every column j,

.. math:: |1 - c a_j| + c\, o_j(s) + s c\, b < 1.

*For given signs* some c > 0 satisfies it if and only if p = min_j (a_j - o_j(s) - s b) is positive: for c a_j ≤ 1 the
condition on j is c (a_j - o_j - s b) > 0, and for c a_j > 1 it is c (a_j + o_j + s b) < 2, which small c meet. With
q = max_j (a_j + o_j + s b) the largest left-hand side is max(1 - c p, c q - 1); the best is c = 2 / (p + q), and the
rate is (q - p) / (q + p).

*No weights for a larger s.* Let G = g W A with any real W, and let ρ(s) + s μ < 1. Then d + s μ < 1, since
ρ(s) ≥ ρ(1) = d, so that G_ii ≥ 1 - d > s μ for all i. Let A_i = Σ_{j ≠ i} z_j A_j, as for every column of a wide A
that is in the span of the others. Row i of G is a combination of rows of A, hence G_ii = Σ_{j ≠ i} z_j G_ij ≤ ‖z‖₁ μ.
Together (μ = 0 would make G_ii zero)

.. math:: s < \min_i \min \{ \|z\|_1 : A_i = \sum_{j \ne i} z_j A_j \} \quad \text{for all weights, one-bit or float.}

Every z is a bound, and the smaller its norm the better; the smallest would need a linear program, and a reweighted
least squares comes near it. For s = 1 the smallest is exact: the dual of the linear program is the row of W. A
second bound is that of uniqueness. Let A z = 0 with a z whose support T has k elements, k ≤ rank A + 1 where A has
more columns than its rank. Σ_{i ∈ T} of |G_ii| |z_i| ≤ Σ_{j ∈ T, j ≠ i} |G_ij| |z_j| shows a column j of T with
|G_jj| ≤ Σ_{i ∈ T, i ≠ j} |G_ij|, which is at most the s - 1 largest and max(0, k - s) μ; so that 1 ≤ ρ(s) + max(0,
k - s) μ, which contradicts ρ(s) + s μ < 1 if k ≤ 2 s. Hence 2 s < k, and s ≤ rank A / 2.

*No signs for a larger s.* The same with one c for all rows: c a_i > s c b, so that s is below min_i a_i / b. Up to
14 rows the largest such ratio of all sign patterns is found by trying them all (rows are independent given b).
Beyond, with L the smallest eigenvalue of A Aᵀ, Σ_{j ≠ i} (S_i · A_j)² = ‖Aᵀ S_i‖² - a_i² ≥ L m - a_i², hence b² ≥
(L m - a_i²) / (n - 1), while a_i ≤ ‖A_i‖₁ (the argument of Welch, "Lower bounds on the maximum cross correlation of
signals", 1974):

.. math:: s < \min_i \|A_i\|_1 \sqrt{(n - 1) / (L m - \|A_i\|_1^2)} \quad \text{where the root is real.}

These conditions are necessary, not sufficient: between the best pattern found and the bounds nothing is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.analysis.unrolled import Unrolled
from pibinn_plugin.tables import text_table

__all__ = ["OneBitExistence", "SpectralContraction", "one_bit_existence", "spectral_contraction"]

_ENUMERABLE_ROWS = 14  # 2^13 sign patterns a column: the pattern and its negative have the same |S · A_j|
_REWEIGHTINGS = 30
_ROUNDING = 1e-6  # must not make the possible impossible


@dataclass(frozen=True, eq=False)
class SpectralContraction:
    """‖I - g W A‖₂ of each layer and block.

    Args:
        norms: shape ``(layers, blocks)``.
        wide: whether A has more columns than rows, so that no weight can give less than 1.
    """

    norms: Tensor
    wide: bool

    def __str__(self) -> str:
        rows = [
            [str(k + 1), f"{norms.max():.6g}", f"{int((norms < 1).sum())}/{len(norms)}"]
            for k, norms in enumerate(self.norms)
        ]
        wide = " A has more columns than rows: no weight can give less than 1." if self.wide else ""
        return (
            text_table(("layer", "‖I - g W A‖₂", "contracting blocks"), rows)
            + f"Worst block of each layer. Assumed: the proximal map is nonexpansive; A is this A.{wide}"
        )


def spectral_contraction(unrolled: Unrolled) -> SpectralContraction:
    r"""‖I - g_k W_k A‖₂ of each layer and block, from singular values.

    Args:
        unrolled: the iteration; its thresholds play no part.

    Example:
        >>> unrolled = Unrolled(torch.eye(3)[None], torch.eye(3)[None], torch.tensor([0.25]))
        >>> spectral_contraction(unrolled).norms.item()
        0.75
    """
    m, n = unrolled.operator.shape[1:]
    norms = [
        torch.linalg.matrix_norm(torch.eye(n) - step_size * weight @ unrolled.operator, 2)
        for step_size, weight in zip(unrolled.step_sizes, unrolled.weights, strict=True)
    ]
    return SpectralContraction(torch.stack(norms), wide=m < n)


@dataclass(frozen=True, eq=False)
class OneBitExistence:
    """For one block of an operator, for how many nonzeros s one-bit weights contract in the sense of the theorem.

    Args:
        adjoint_sparsity: the largest s for S = sign(Aᵀ); 0 for none.
        best_sparsity: the largest s of the patterns that were tried.
        impossible_above: no sign pattern contracts for a larger s; a smaller one need not exist.
        float_impossible_above: no real weight whatever contracts for a larger s; a smaller one need not exist.
        signs: a pattern that attains ``best_sparsity``, shape ``(n, m)``.
        scale: the best c = g λ for it at ``best_sparsity`` (at least s = 1); 0 where no c contracts.
        rate: ρ(s) + s μ with that scale; below 1 it contracts.
    """

    adjoint_sparsity: int
    best_sparsity: int
    impossible_above: int
    float_impossible_above: int
    signs: Tensor
    scale: float
    rate: float

    def __str__(self) -> str:
        rows = [
            ["signs of A^T", str(self.adjoint_sparsity)],
            ["best signs found", str(self.best_sparsity)],
            ["no signs above", str(self.impossible_above)],
            ["no float weights above", str(self.float_impossible_above)],
        ]
        known = (
            "No signs do better than those found"
            if self.best_sparsity == self.impossible_above
            else "Between the two, nothing is known"
        )
        return text_table(("weights", "largest s"), rows, left_columns=1) + (
            f"{known}. Rate of the best at s = {max(self.best_sparsity, 1)}, with g λ = {self.scale:.4g}: "
            f"{self.rate:.4g}.\nContracting means ρ(s) + s μ < 1, the condition of the certificates: a worst case over "
            "s-sparse x*;\naverage behaviour can be better. Assumed: a dense block; one g λ for all its rows."
        )


def one_bit_existence(operator: Tensor, sweeps: int = 5) -> OneBitExistence:
    """Whether some S = ±1 gives a contraction for this block, and how good S = sign(Aᵀ) is.

    Tried are sign(Aᵀ), single flips from there that lower a row's b / a_i and, up to 14 rows, the pattern with the
    largest min a_i / b of all, which contracts for s = 1 if any pattern does.

    Args:
        operator: A, shape ``(m, n)``, n at least 2.
        sweeps: of the flip search over all entries.

    Raises:
        ValueError: not a finite matrix of at least two columns, or a column of zeros.

    Example:
        >>> result = one_bit_existence(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        >>> result.adjoint_sparsity, result.best_sparsity, result.impossible_above
        (2, 2, 2)
    """
    if operator.dim() != 2 or operator.shape[1] < 2 or not operator.isfinite().all():
        raise ValueError(f"expected a finite matrix of at least two columns; got shape {tuple(operator.shape)}")
    a = operator.detach().to("cpu", torch.float64)
    if not (a != 0).any(0).all():
        raise ValueError(f"column {int((a == 0).all(0).nonzero()[0])} of the operator is zero: it cannot be recovered")
    adjoint = torch.where(a.mT >= 0, 1.0, -1.0).double()
    patterns, ratio_of_signs = [adjoint, _flip(a, adjoint.clone(), sweeps)], _ratio_of_signs(a)
    if a.shape[0] <= _ENUMERABLE_ROWS:
        patterns.append(_enumerate(a))
        ratio_of_signs = _margin_ratio(a, patterns[-1])
    sparsities = [_largest_sparsity(a, signs) for signs in patterns]
    best = max(sparsities)
    signs = patterns[sparsities.index(best)]
    p, q = _slopes(a, signs, max(best, 1))
    possible = min(_below(_ratio_of_any_weight(a), a.shape[1]), _unique(a))
    return OneBitExistence(
        adjoint_sparsity=sparsities[0],
        best_sparsity=best,
        impossible_above=min(possible, _below(ratio_of_signs, a.shape[1])),
        float_impossible_above=possible,
        signs=signs,
        scale=2 / (p + q) if p > 0 else 0.0,
        rate=(q - p) / (q + p) if p > 0 else 1.0,
    )


def _correlations(a: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """a_i, and |S_i · A_j| with zeros on its diagonal."""
    product = signs @ a
    own = product.diagonal()
    return own, (product - torch.diag(own)).abs()


def _slopes(a: Tensor, signs: Tensor, sparsity: int) -> tuple[float, float]:
    """P and q of the module's docstring."""
    own, cross = _correlations(a, signs)
    others = cross.topk(sparsity - 1, dim=0).values.sum(0) + sparsity * cross.max()
    return float((own - others).min()), float((own + others).max())


def _largest_sparsity(a: Tensor, signs: Tensor) -> int:
    """The largest s for which some c contracts with these signs."""
    sparsity = 0
    while sparsity < a.shape[1] and _slopes(a, signs, sparsity + 1)[0] > 0:
        sparsity += 1
    return sparsity


def _margin_ratio(a: Tensor, signs: Tensor) -> float:
    """The smallest a_i over b, infinite for b = 0."""
    own, cross = _correlations(a, signs)
    return float(own.min() / cross.max())


def _below(ratio: float, columns: int) -> int:
    """The largest s ≤ n that may be below the ratio."""
    ratio *= 1 + _ROUNDING
    return max(0, columns if ratio > columns else math.ceil(ratio) - 1)


def _ratio_of_any_weight(a: Tensor) -> float:
    """The smallest ‖z‖₁ found over all columns; infinite where no column is in the span of the others."""
    least = math.inf
    for column in range(a.shape[1]):
        others = torch.cat([a[:, :column], a[:, column + 1 :]], dim=1)
        size = torch.ones(others.shape[1], dtype=a.dtype)
        for _ in range(_REWEIGHTINGS):
            # The z of the smallest Σ z_j² / |z_j|, with the magnitudes of the last round.
            z = size.sqrt() * (torch.linalg.pinv(others * size.sqrt(), rtol=1e-10) @ a[:, column])
            if (others @ z - a[:, column]).norm() > 1e-9 * a[:, column].norm():
                break  # outside the span, or not solved well enough to say
            least = min(least, float(z.abs().sum()))
            size = z.abs() + 1e-6 * z.abs().max()
    return least


def _unique(a: Tensor) -> int:
    """The bound by the rank."""
    rank = int(torch.linalg.matrix_rank(a))
    return rank // 2 if rank < a.shape[1] else a.shape[1]


def _ratio_of_signs(a: Tensor) -> float:
    """The bound after Welch."""
    m, n = a.shape
    least, length = max(0.0, float(torch.linalg.eigvalsh(a @ a.mT)[0])), a.abs().sum(0)
    remainder = least * m - length.square()
    return float(torch.where(remainder > 0, length * ((n - 1) / remainder.clamp_min(1e-300)).sqrt(), torch.inf).min())


def _enumerate(a: Tensor) -> Tensor:
    """The pattern with the largest min a_i / b of all."""
    m, n = a.shape
    bits = torch.arange(2 ** (m - 1))[:, None] >> torch.arange(m) & 1
    patterns = 2.0 * bits.double() - 1
    product = patterns @ a  # of a pattern and, negated, of its negative
    own, cross = product.abs(), torch.empty(len(patterns), n, dtype=torch.float64)
    largest = own.topk(2, dim=1)
    for i in range(n):
        cross[:, i] = torch.where(largest.indices[:, 0] == i, largest.values[:, 1], largest.values[:, 0])
    # For each row the patterns in the order of b, and the best a_i up to there.
    cross, order = cross.sort(0)
    best_own, best_index = own.gather(0, order).cummax(0)
    bounds = cross.flatten().unique()
    ends = torch.searchsorted(cross.mT.contiguous(), bounds.expand(n, -1).contiguous(), right=True) - 1
    own_within = torch.where(ends >= 0, best_own.mT.gather(1, ends.clamp_min(0)), 0.0)
    choice = int((own_within.amin(0) / bounds).nan_to_num(0.0).argmax())
    index = order.gather(0, best_index.gather(0, ends[:, choice].clamp_min(0)[None]))[0]
    chosen = patterns[index]
    return chosen * torch.where((chosen * a.mT).sum(-1, keepdim=True) >= 0, 1.0, -1.0)


def _flip(a: Tensor, signs: Tensor, sweeps: int) -> Tensor:
    """Flip entry after entry of all rows at once, each where it lowers the row's b / a_i."""
    for _ in range(sweeps):
        changed = False
        for entry in range(a.shape[0]):
            flipped = signs.clone()
            flipped[:, entry] *= -1
            (own, cross), (new_own, new_cross) = _correlations(a, signs), _correlations(a, flipped)
            better = (new_own > 0) & (new_cross.amax(-1) * own < cross.amax(-1) * new_own)
            signs = torch.where(better[:, None], flipped, signs)
            changed |= bool(better.any())
        if not changed:
            break
    return signs
