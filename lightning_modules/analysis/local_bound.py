r"""The local Rademacher bound of M networks, and why the bound by codes is never above it.

Bartlett, Bousquet and Mendelson, "Local Rademacher complexities", Annals of Statistics 33(4), 2005, Theorem 3.3, second
part. Let F be a class of functions with values in [a, b] (losses of networks), P f their mean over the distribution of
the examples, P_n f that over n independent ones. Let Var f ≤ T(f) ≤ B P f and T(αf) ≤ α² T(f) for α in [0, 1], let ψ be
sub-root (nonnegative, nondecreasing, ψ(r)/√r nonincreasing) with the fixed point r*, and let
ψ(r) ≥ B E R_n {f ∈ star(F, 0) : T(f) ≤ r} for r ≥ r*, where R_n is the Rademacher average and star(F, 0) holds all αf.
Then for all K > 1 and x > 0, with probability 1 - e^{-x} at least, for all f

.. math:: P f \le \frac{K}{K-1} P_n f + \frac{7.04 K}{B} r^* + \frac{x (21 (b - a) + 6.4 B K)}{n}.

The paper prints 6, 11 and 5 for 7.04, 21 and 6.4; its proof, with its α = 1/10, gives 4 · 1.1² + 2 · 1.1 = 7.04,
2 (1/3 + 10) ≤ 21 and 4 · 1.1 + 2 = 6.4, and those are used here.

Here a = 0, b = B = 1 and T(f) = P f², which has all these properties, and for M functions

.. math:: \psi(r) = \sqrt{2 r L / n} + L / (3n), \quad L = \log(M + 1).

*Proof.* An f of star(F, 0) with T(f) ≤ r is α times one of the M functions; at the largest such α, and with the zero
function, M + 1 functions g with P g² ≤ r hold the supremum, which is linear in α. For 0 ≤ g ≤ 1,
cosh(s g) - 1 ≤ g² (cosh s - 1), so that log E exp(s Σ σ_i g(X_i)) ≤ n r (cosh s - 1) ≤ n r s² / (2 (1 - s/3)), and the
maximum of M + 1 such sums has at most the mean √(2 n r L) + L / 3 (Boucheron, Lugosi and Massart, "Concentration
Inequalities", 2013, Corollary 2.6). A sum of c √r and a constant is sub-root. ∎

K is the best of 2, 4, ..., 2^16: δ/16 is spent on each.

**It is nowhere the tighter one** for networks that are stored, which are finitely many. With
q = (log M + log(1/δ)) / n, `kl_bound` allows p̂ + √(2 p̂ q) + 2 q at most (kl(p̂ ‖ p) ≥ (p - p̂)² / 2p for p ≥ p̂). Here
r* = ψ(r*) ≥ √(2 r* L / n), so that r* ≥ 2 L / n, and with x ≥ log(1/δ) the bound is at least
p̂ + p̂ / (K - 1) + 6.4 K q ≥ p̂ + 2 √(6.4 p̂ q) + 6.4 q. ∎ A local bound can be the tighter one only where its complexity
is not a count: in classes of real-valued weights, which have no code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SubRoot", "local_bound", "local_complexity"]

_FACTORS = tuple(2.0**power for power in range(1, 17))  # K
_RADIUS, _RANGE, _FACTOR = 7.04, 21.0, 6.4


@dataclass(frozen=True)
class SubRoot:
    """ψ(r) = slope √r + offset, for a slope and an offset of at least 0.

    Example:
        >>> psi = SubRoot(slope=1.0, offset=2.0)
        >>> psi.fixed_point, psi(psi.fixed_point)
        (4.0, 4.0)
    """

    slope: float
    offset: float

    def __call__(self, r: float) -> float:
        """ψ(r), r at least 0."""
        return self.slope * math.sqrt(r) + self.offset

    @property
    def fixed_point(self) -> float:
        """r* = ψ(r*): the square of the positive root of z² = slope z + offset."""
        return ((self.slope + math.sqrt(self.slope**2 + 4 * self.offset)) / 2) ** 2


def local_complexity(log_size: float, examples: int) -> SubRoot:
    """The ψ of the module's docstring, a bound of E R_n {f ∈ star(F, 0) : P f² ≤ r}.

    Example:
        >>> local_complexity(math.log(4), 100).fixed_point < local_complexity(math.log(4), 50).fixed_point
        True
    """
    largest = log_size + math.log1p(math.exp(-log_size))  # log(M + 1)
    return SubRoot(math.sqrt(2 * largest / examples), largest / (3 * examples))


def local_bound(log_size: float, examples: int, empirical: float, failure_probability: float) -> float:
    """A bound of P f for a function that was chosen of M on the same n examples; 1 or more says nothing.

    Args:
        log_size: log M, natural.
        examples: n.
        empirical: P_n f.
        failure_probability: δ.

    Example:
        >>> round(local_bound(math.log(1024), examples=10_000, empirical=0.01, failure_probability=0.05), 3)
        0.065
    """
    radius = local_complexity(log_size, examples).fixed_point
    x = math.log(len(_FACTORS) / failure_probability)
    return min(k / (k - 1) * empirical + _RADIUS * k * radius + x * (_RANGE + _FACTOR * k) / examples for k in _FACTORS)
