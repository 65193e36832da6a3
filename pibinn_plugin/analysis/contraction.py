r"""Spectral contraction of an unrolled iteration, and whether one-bit weights can contract at all for an operator.

**Spectral.** For every nonexpansive proximal map P, x ↦ P(x + g W (y - A x)) is Lipschitz with the constant
‖I - g W A‖₂: two inputs x, x' come as near as (I - g W A)(x - x'). Where A has fewer rows than columns this is never
below 1, whatever W is: I - g W A is the identity on the null space of A. Such problems contract on sparse vectors only,
which is what `pibinn_plugin.analysis.convergence` certifies.

**Existence.** Let W = λ S with all of a block structural, S = ±1, and let a_i = S_i · A_i be the correlation of row i
with its own column A_i, b = max_{i ≠ j} |S_i · A_j| the largest with another. With c = g λ the constants of the
convergence theorem are d = max_i |1 - c a_i| and μ = c b. Some c > 0 gives d + (2s - 1) μ < 1 if and only if

.. math:: \min_i a_i > (2s - 1)\, b,

and the best is c = 2 / (min a + max a), with d + (2s - 1) μ = 1 - c (min a - (2s - 1) b): for smaller c, d is
1 - c min a and the sum falls with c; for larger c, d is c max a - 1 and it rises. S = sign(Aᵀ) has the largest
possible a_i = ‖A_i‖₁ in every row; another S can only lower b. At s = 1 this is the theorem's condition exactly; for
larger s the theorem, with ρ(s) in place of d + (s - 1) μ, may allow a little more.

Two bounds say for which s no pattern can. First, with P the orthogonal projection on the row space of A, (I - P) e_i is
in the null space of A, so that A_i = Σ_{j ≠ i} z_j A_j with z_j = P_ji / (1 - P_ii), and w · A_i is at most
‖z‖₁ max_{j ≠ i} |w · A_j| for every real w, a row of signs or not:

.. math:: 2s - 1 < \min_i \sum_{j \ne i} |P_{ji}| / (1 - P_{ii}) \quad \text{for all weights, one-bit or float.}

Second, with L the smallest eigenvalue of A Aᵀ, Σ_{j ≠ i} (S_i · A_j)² = ‖Aᵀ S_i‖² - a_i² ≥ L m - a_i², hence
b² ≥ (L m - a_i²) / (n - 1), while a_i ≤ ‖A_i‖₁ (the argument of Welch, "Lower bounds on the maximum cross correlation
of signals", 1974):

.. math:: 2s - 1 < \min_i \|A_i\|_1 \sqrt{(n - 1) / (L m - \|A_i\|_1^2)} \quad \text{where the root is real.}
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pibinn_plugin.analysis.unrolled import Unrolled, multiply
from pibinn_plugin.tables import text_table

__all__ = [
    "OneBitExistence",
    "SignAdjointMoments",
    "SpectralContraction",
    "one_bit_existence",
    "sign_adjoint_moments",
    "spectral_contraction",
]

_ENUMERABLE_ROWS = 14  # 2^13 sign patterns a column: the pattern and its negative have the same |S · A_j|


@dataclass(frozen=True, eq=False)
class SpectralContraction:
    """‖I - g W A‖₂ of each layer and block, between two bounds.

    Args:
        lower: shape ``(layers, blocks)``.
        upper: the same shape; equal to ``lower`` where the value is exact.
        failure_probability: of each upper bound that is not exact, over the random start of the iteration.
        wide: whether A has more columns than rows, so that no weight can give less than 1.
    """

    lower: Tensor
    upper: Tensor
    failure_probability: float
    wide: bool

    def __str__(self) -> str:
        rows = [
            [str(k + 1), f"{low.max():.6g}", f"{high.max():.6g}", f"{int((high < 1).sum())}/{len(high)}"]
            for k, (low, high) in enumerate(zip(self.lower, self.upper, strict=True))
        ]
        exact = torch.equal(self.lower, self.upper)
        how = (
            "Exact up to rounding (singular values)."
            if exact
            else f"Power iteration: an upper bound fails with probability {self.failure_probability:g} at most."
        )
        wide = " A has more columns than rows: no weight can give less than 1." if self.wide else ""
        return (
            text_table(("layer", "at least", "at most", "contracting blocks"), rows)
            + "‖I - g W A‖₂, worst block of each layer. Assumed: the proximal map is nonexpansive; A is this A.\n"
            + how
            + wide
        )


def spectral_contraction(
    unrolled: Unrolled,
    exact_up_to: int = 512,
    iterations: int = 300,
    failure_probability: float = 1e-6,
    generator: torch.Generator | None = None,
) -> SpectralContraction:
    r"""‖I - g_k W_k A‖₂ per block: by singular values up to a size, by power iteration beyond.

    Power iteration applies T = I - g W A and its transpose as products with A and W, and never forms them. With
    B = TᵀT, a uniform unit start v and q iterations, ‖Bv‖ after normalised steps bounds ‖T‖² from below, and
    ‖B^q v‖ ≥ ‖T‖^{2q} |⟨v, u⟩|, u the leading eigenvector, from above. The density of ⟨v, u⟩ is at most √(n / 2π), so
    that |⟨v, u⟩| ≥ p √(π / 2n) with probability 1 - p at least:

    .. math:: \|T\| \le \left(\|B^q v\| \sqrt{2 n / \pi} \,/\, p\right)^{1 / 2q}.

    Args:
        unrolled: the iteration; its thresholds play no part.
        exact_up_to: the largest n for singular values.
        iterations: q.
        failure_probability: p, for each layer and block.
        generator: of the start.

    Raises:
        ValueError: fewer than one iteration, or a probability outside (0, 1).

    Example:
        >>> unrolled = Unrolled(torch.eye(3)[None], torch.eye(3)[None], torch.tensor([0.25]))
        >>> spectral_contraction(unrolled).upper.item()
        0.75
    """
    if iterations < 1 or not 0 < failure_probability < 1:
        raise ValueError(
            "expected at least one iteration and a probability between 0 and 1; "
            f"got {iterations} and {failure_probability}"
        )
    m, n = unrolled.operator.shape[1:]
    bounds = []
    for step_size, weight in zip(unrolled.step_sizes, unrolled.weights, strict=True):
        if n <= exact_up_to:
            norm = torch.linalg.matrix_norm(torch.eye(n) - step_size * weight @ unrolled.operator, 2)
            bounds.append((norm, norm))
        else:
            start = torch.randn(len(weight), n, generator=generator, dtype=torch.float64)
            log_slack = math.log(math.sqrt(2 * n / math.pi) / failure_probability)
            bounds.append(_power_bounds(unrolled.operator, step_size * weight, start, iterations, log_slack))
    lower, upper = (torch.stack(side) for side in zip(*bounds, strict=True))
    return SpectralContraction(lower, upper, failure_probability, wide=m < n)


def _power_bounds(
    operator: Tensor, weight: Tensor, vector: Tensor, iterations: int, log_slack: float
) -> tuple[Tensor, Tensor]:
    vector = vector / vector.norm(dim=-1, keepdim=True)
    log_norm = vector.new_zeros(len(vector))
    for _ in range(iterations):
        image = vector - multiply(weight, multiply(operator, vector))
        vector = image - multiply(operator.mT, multiply(weight.mT, image))
        norm = vector.norm(dim=-1)
        log_norm += norm.log()  # of ‖B^q v‖, which itself would overflow
        vector = vector / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None]
    return norm.sqrt(), ((log_norm + log_slack) / (2 * iterations)).exp()


@dataclass(frozen=True, eq=False)
class OneBitExistence:
    """For one block of an operator, the largest s for which one-bit weights contract in the sense of the theorem.

    Args:
        adjoint_sparsity: the largest s for S = sign(Aᵀ); 0 for none.
        best_sparsity: the largest s found over sign patterns.
        impossible_above: no sign pattern contracts for a larger s.
        float_impossible_above: no real weight whatever contracts for a larger s.
        signs: a pattern that attains ``best_sparsity``, shape ``(n, m)``.
        scale: the best c = g λ for it and ``best_sparsity`` (at least s = 1).
        rate: d + (2s - 1) μ with that scale; below 1 it contracts.
        exhaustive: whether all sign patterns were tried, so that ``best_sparsity`` is the largest there is.
    """

    adjoint_sparsity: int
    best_sparsity: int
    impossible_above: int
    float_impossible_above: int
    signs: Tensor
    scale: float
    rate: float
    exhaustive: bool

    def __str__(self) -> str:
        search = "all sign patterns tried" if self.exhaustive else "flips searched from sign(A^T), not all patterns"
        rows = [
            ["sign(A^T)", str(self.adjoint_sparsity)],
            ["best pattern found", str(self.best_sparsity)],
            ["no pattern above", str(self.impossible_above)],
            ["no float weights above", str(self.float_impossible_above)],
        ]
        return text_table(("sign pattern", "largest s"), rows) + (
            f"Rate of the best pattern at s = {max(self.best_sparsity, 1)}, with g λ = {self.scale:.4g}: "
            f"{self.rate:.4g}; {search}.\nAssumed: a dense block; one g λ for all rows; worst case over s-sparse x*:\n"
            "d + (2s - 1) μ < 1, the condition of Chen, Liu, Wang, Yin 2018. Average behaviour can be better."
        )


def one_bit_existence(operator: Tensor, sweeps: int = 5) -> OneBitExistence:
    """Whether some S = ±1 gives a contraction for this block, and how good S = sign(Aᵀ) is.

    Up to 14 rows, exact: for each bound on the cross-correlation b, each row takes the pattern with the largest a_i
    within it, since rows are independent given b. Beyond, single flips that lower a row's b / a_i, from sign(Aᵀ).

    Args:
        operator: A, shape ``(m, n)``, n at least 2.
        sweeps: of the flip search over all entries.

    Raises:
        ValueError: not a finite matrix of at least two columns, or a column of zeros.

    Example:
        >>> result = one_bit_existence(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        >>> result.adjoint_sparsity, result.best_sparsity, result.exhaustive
        (2, 2, True)
    """
    if operator.dim() != 2 or operator.shape[1] < 2 or not operator.isfinite().all():
        raise ValueError(f"expected a finite matrix of at least two columns; got shape {tuple(operator.shape)}")
    a = operator.detach().to("cpu", torch.float64)
    if not (a != 0).any(0).all():
        raise ValueError(f"column {int((a == 0).all(0).nonzero()[0])} of the operator is zero: it cannot be recovered")
    adjoint = torch.where(a.mT >= 0, 1.0, -1.0).double()
    exhaustive = a.shape[0] <= _ENUMERABLE_ROWS
    found = _enumerate(a) if exhaustive else _flip(a, adjoint.clone(), sweeps)
    signs = max(adjoint, found, key=lambda s: _margin_ratio(a, s))
    own, cross = _correlations(a, signs)
    best = _sparsity(_margin_ratio(a, signs), a.shape[1])
    scale = float(2 / (own.min() + own.max()))
    # Rounding must not make the possible impossible.
    any_weight, any_signs = (1 + 1e-6) * _ratio_of_any_weight(a), (1 + 1e-6) * _ratio_of_signs(a)
    return OneBitExistence(
        adjoint_sparsity=_sparsity(_margin_ratio(a, adjoint), a.shape[1]),
        best_sparsity=best,
        impossible_above=_sparsity(min(any_weight, any_signs), a.shape[1]),
        float_impossible_above=_sparsity(any_weight, a.shape[1]),
        signs=signs,
        scale=scale,
        rate=1 - scale * float(own.min() - (2 * max(best, 1) - 1) * cross.max()),
        exhaustive=exhaustive,
    )


def _correlations(a: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """a_i, and the largest |S_i · A_j| of each row."""
    product = signs @ a
    own = product.diagonal()
    return own, (product - torch.diag(own)).abs().amax(-1)


def _margin_ratio(a: Tensor, signs: Tensor) -> float:
    """The smallest a_i over b, infinite for b = 0: contraction at s is 2s - 1 below it."""
    own, cross = _correlations(a, signs)
    return float(own.min() / cross.max())


def _sparsity(ratio: float, columns: int) -> int:
    """The largest s ≤ n with 2s - 1 < ratio."""
    return max(0, columns if ratio > 2 * columns - 1 else math.ceil((ratio + 1) / 2) - 1)


def _ratio_of_any_weight(a: Tensor) -> float:
    """The first bound of the module's docstring."""
    projection = torch.linalg.pinv(a) @ a
    own = projection.diagonal()
    others = projection.abs().sum(0) - own.abs()
    # A column outside the span of the others (P_ii = 1) has no such bound; nor has one that rounding hides.
    return float(torch.where(own < 1 - 1e-9, others / (1 - own).clamp_min(1e-9), torch.inf).min())


def _ratio_of_signs(a: Tensor) -> float:
    """The second bound."""
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
            better = (new_own > 0) & (new_cross * own < cross * new_own)
            signs = torch.where(better[:, None], flipped, signs)
            changed |= bool(better.any())
        if not changed:
            break
    return signs


@dataclass(frozen=True)
class SignAdjointMoments:
    """Closed forms for G = sign(A)ᵀ A of a random A of independent columns with E‖A_i‖² = 1.

    Args:
        ensemble: of A.
        diagonal_mean: E G_ii.
        diagonal_variance: Var G_ii.
        off_diagonal_variance: Var G_ij, i ≠ j; the mean is 0.
        largest_off_diagonal: an upper bound of E max_{i ≠ j} |G_ij|.
    """

    ensemble: str
    diagonal_mean: float
    diagonal_variance: float
    off_diagonal_variance: float
    largest_off_diagonal: float

    def __str__(self) -> str:
        rows = [
            ["E G_ii", f"{self.diagonal_mean:.5g}"],
            ["Var G_ii", f"{self.diagonal_variance:.5g}"],
            ["E G_ij", "0"],
            ["Var G_ij", f"{self.off_diagonal_variance:.5g}"],
            ["E max |G_ij| at most", f"{self.largest_off_diagonal:.5g}"],
        ]
        return text_table(("G = sign(A)^T A", "value"), rows) + (
            f"Assumed: A drawn from the {self.ensemble!r} ensemble, independent columns of mean square length 1."
        )


def sign_adjoint_moments(ensemble: str, rows: int, columns: int) -> SignAdjointMoments:
    r"""What S = sign(Aᵀ) gives on average, for three ensembles of random operators.

    ``"gaussian"``: entries N(0, 1/m); ‖A_i‖₁ has the mean √(2m/π) and the variance 1 - 2/π. ``"sphere"``: Gaussian
    columns scaled to length 1; the mean is m Γ(m/2) / (√π Γ((m+1)/2)), and E‖A_i‖₁² = 1 + 2(m - 1)/π, by E r² = m for
    the length r of m standard normals, which is independent of their direction. ``"sign"``: entries ±1/√m; ‖A_i‖₁ = √m.
    In all three, S_i and A_j are independent, G_ij has the mean 0 and the variance 1, and E exp(t G_ij) ≤ exp(t²/2), so
    that the maximum of the 2n(n - 1) variables ±G_ij has a mean of at most √(2 log 2n(n - 1)).

    Args:
        ensemble: ``"gaussian"``, ``"sphere"`` or ``"sign"``.
        rows: m.
        columns: n, at least 2.

    Raises:
        ValueError: another ensemble, no row or fewer than two columns.

    Example:
        >>> sign_adjoint_moments("sign", 64, 128).diagonal_mean
        8.0
    """
    if rows < 1 or columns < 2:
        raise ValueError(f"expected at least one row and two columns; got {rows} and {columns}")
    mean_on_sphere = rows / math.sqrt(math.pi) * math.exp(math.lgamma(rows / 2) - math.lgamma((rows + 1) / 2))
    moments = {
        "gaussian": (math.sqrt(2 * rows / math.pi), 1 - 2 / math.pi),
        "sphere": (mean_on_sphere, 1 + 2 * (rows - 1) / math.pi - mean_on_sphere**2),
        "sign": (math.sqrt(rows), 0.0),
    }
    if ensemble not in moments:
        raise ValueError(f"unknown ensemble {ensemble!r}; expected one of {', '.join(moments)}")
    return SignAdjointMoments(ensemble, *moments[ensemble], 1.0, math.sqrt(2 * math.log(2 * columns * (columns - 1))))
