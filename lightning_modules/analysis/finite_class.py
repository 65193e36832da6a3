r"""How far the risk of any of M functions can be from its mean over n examples: four bounds, by their logarithm log M.

Let F be a class of functions f of an example with values in [0, 1] (losses of networks), P f the mean of f over the
distribution of the examples, P_n f its mean over n independent ones, and R_n F = sup_f (1/n) Σ σ_i f(X_i) with random
signs σ_i. F is within τ (``resolution``) of M functions of F: for each f there is one that differs from it by at most
τ everywhere. Each bound below is applied to these M functions; P_n f + τ in place of P_n f, and τ added to the result,
make it one for all of F. Each fails with probability δ at most, for *all* f at once.

**Global.** (1) Massart, "Some applications of concentration inequalities to statistics", 2000, Lemma 5.2: the mean of
the maximum of M sums Σ σ_i a_i is at most max‖a‖₂ √(2 log M). Subtracting 1/2 from all f changes no E R_n, so that
‖a‖₂ ≤ √n / 2 and

.. math:: E R_n F \le \sqrt{\log M / (2n)}.

(2) Symmetrization: E sup_f (P f - P_n f) ≤ 2 E R_n F. (3) One example changes the supremum by 1/n at most; by
McDiarmid's inequality of bounded differences it passes its mean by √(log(1/δ) / 2n) with probability δ at most:

.. math:: P f \le P_n f + \sqrt{2 \log M / n} + \sqrt{\log(1/\delta) / (2n)}.

**Local.** Bartlett, Bousquet and Mendelson, "Local Rademacher complexities", Annals of Statistics 33(4), 2005,
Theorem 3.3. Let the functions have values in [a, b], and let Var f ≤ T(f) ≤ B P f for all f, for some functional T ≥ 0
and some constant B. Let ψ be sub-root (nonnegative, nondecreasing, ψ(r)/√r nonincreasing) with the fixed point r*.

*First part.* If ψ(r) ≥ B E R_n {f ∈ F : T(f) ≤ r} for all r ≥ r*, then for all K > 1 and x > 0, with probability
1 - e^{-x} at least, for all f

.. math:: P f \le \frac{K}{K-1} P_n f + \frac{704 K}{B} r^* + \frac{x (11 (b - a) + 26 B K)}{n}.

*Second part.* If moreover T(αf) ≤ α² T(f) for α in [0, 1], and ψ(r) ≥ B E R_n {f ∈ star(F, 0) : T(f) ≤ r}, where
star(F, 0) holds all αf, smaller constants do. The paper prints 6, 11 and 5 for 704, 11 and 26; its proof, with its
α = 1/10, gives 4 · 1.1² + 2 · 1.1 = 7.04, 2 (1/3 + 10) ≤ 21 and 4 · 1.1 + 2 = 6.4, and those are used here. (The proof
of the first part gives 704 and 26 as printed, and again 21 where 11 is printed, which is too little to be seen beside
the 704.)

Here a = 0, b = B = 1 and T(f) = P f², which has all these properties, and

.. math:: \psi(r) = \sqrt{2 r L / n} + L / (3n), \quad L = \log(M + 1),

serves for both parts. *Proof.* An f of star(F, 0) with T(f) ≤ r is α times one of the M functions; at the largest such
α, and with the zero function, M + 1 functions g with P g² ≤ r hold the supremum, which is linear in α. For 0 ≤ g ≤ 1,
cosh(s g) - 1 ≤ g² (cosh s - 1), so that log E exp(s Σ σ_i g(X_i)) ≤ n r (cosh s - 1) ≤ n r s² / (2 (1 - s/3)), and the
maximum of M + 1 such sums has at most the mean √(2 n r L) + L / 3 (Boucheron, Lugosi and Massart, "Concentration
Inequalities", 2013, Corollary 2.6). A sum of c √r and a constant is sub-root. ∎

K is the best of 2, 4, ..., 2^16: δ/16 is spent on each.

**Union.** Bernstein's inequality for each of the M functions, with Var f ≤ P f, and δ/M spent on each: with
q = (log M + log(1/δ)) / n,

.. math:: P f \le P_n f + \sqrt{2 q\, P f} + q / 3.

It needs no Rademacher average, and for a finite class it is the smallest of the four in most cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["RISK_BOUNDS", "SubRoot", "local_complexity", "massart_bound", "required_examples", "risk_bounds"]

_FACTORS = tuple(2.0**power for power in range(1, 17))  # K
_LARGEST_COUNT = 1 << 100


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


def massart_bound(log_size: float, examples: int) -> float:
    """Massart's bound of E R_n F for M functions with values in [0, 1]: √(log M / 2n).

    Args:
        log_size: log M, natural.
        examples: n.

    Example:
        >>> massart_bound(math.log(4), 100) < massart_bound(math.log(4), 50)
        True
    """
    return math.sqrt(log_size / (2 * examples))


def local_complexity(log_size: float, examples: int) -> SubRoot:
    """The ψ of the module's docstring, a bound of E R_n {f ∈ star(F, 0) : P f² ≤ r}.

    Example:
        >>> local_complexity(math.log(4), 100).fixed_point < local_complexity(math.log(4), 50).fixed_point
        True
    """
    largest = log_size + math.log1p(math.exp(-log_size))  # log(M + 1)
    return SubRoot(math.sqrt(2 * largest / examples), largest / (3 * examples))


def _global(log_size: float, examples: int, empirical: float, log_failures: float) -> float:
    return empirical + 2 * massart_bound(log_size, examples) + math.sqrt(log_failures / (2 * examples))


def _local(constants: tuple[float, float, float]) -> Callable[[float, int, float, float], float]:
    of_radius, of_range, of_factor = constants

    def bound(log_size: float, examples: int, empirical: float, log_failures: float) -> float:
        radius = local_complexity(log_size, examples).fixed_point
        x = log_failures + math.log(len(_FACTORS))
        return min(
            k / (k - 1) * empirical + of_radius * k * radius + x * (of_range + of_factor * k) / examples
            for k in _FACTORS
        )

    return bound


def _union(log_size: float, examples: int, empirical: float, log_failures: float) -> float:
    q = (log_size + log_failures) / examples
    return SubRoot(math.sqrt(2 * q), empirical + q / 3).fixed_point


RISK_BOUNDS: Mapping[str, Callable[[float, int, float, float], float]] = MappingProxyType(
    {"global": _global, "local": _local((704, 11, 26)), "local, star": _local((7.04, 21, 6.4)), "union": _union}
)


def risk_bounds(
    log_size: float, examples: int, empirical: float, resolution: float = 0.0, failure_probability: float = 0.05
) -> dict[str, float]:
    """Bounds of P f by name, for a function that may have been chosen on the same n examples.

    Args:
        log_size: log M, natural.
        examples: n.
        empirical: P_n f.
        resolution: τ.
        failure_probability: δ, of each bound.

    Returns:
        ``global``, ``local`` (first part of the theorem, as printed), ``local, star`` (second part) and ``union``.
        A bound of 1 or more is vacuous: no function is above 1.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> bounds = risk_bounds(math.log(1024), examples=10_000, empirical=0.01)
        >>> {name: round(bound, 3) for name, bound in bounds.items()}
        {'global': 0.059, 'local': 2.618, 'local, star': 0.065, 'union': 0.016}
    """
    if examples < 1 or log_size < 0 or not 0 <= empirical <= 1 or resolution < 0 or not 0 < failure_probability < 1:
        raise ValueError(
            f"log_size={log_size}, examples={examples}, empirical={empirical}, resolution={resolution}, "
            f"failure_probability={failure_probability}: expected at least one function and one example, an empirical "
            "mean in [0, 1], a resolution of at least 0 and a probability between 0 and 1"
        )
    log_failures = -math.log(failure_probability)
    return {
        name: bound(log_size, examples, empirical + resolution, log_failures) + resolution
        for name, bound in RISK_BOUNDS.items()
    }


def required_examples(bound: Callable[[int], float], target: float) -> int | None:
    """The smallest n with ``bound(n) <= target``, for a bound that does not grow with n; None if 2^100 do not do.

    Example:
        >>> required_examples(lambda n: 2 * massart_bound(math.log(1024), n), target=0.1)
        1387
    """
    enough = 1
    while bound(enough) > target:
        if enough >= _LARGEST_COUNT:
            return None
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        too_few, enough = (too_few, middle) if bound(middle) <= target else (middle, enough)
    return enough
