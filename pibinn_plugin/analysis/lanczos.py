r"""The largest eigenvalue of a symmetric positive semidefinite map, from products with it: two bounds.

k steps of the Lanczos iteration from a start v, uniform on the sphere of R^n, give the largest Ritz value θ, the
largest of ⟨w, B w⟩ over the unit vectors w of span{v, B v, ..., B^{k-1} v}. It is never above the largest eigenvalue
λ₁ of B (but for rounding), and with probability 1 - p at least

.. math:: \lambda_1 \le \theta \cosh^2\left(\frac{\mathrm{arsinh}(\sqrt{2n/\pi}\, / p)}{2k - 1}\right).

*Proof.* Let v = Σ c_i u_i in eigenvectors, and let θ < (1 - ε) λ₁ with 0 < ε < 1. For every polynomial q of degree
k - 1, w = q(B) v has a Rayleigh quotient of at most θ, so that

.. math:: c_1^2\, q(\lambda_1)^2\, \varepsilon \lambda_1 \le \sum_{\lambda_i \le (1 - \varepsilon) \lambda_1} c_i^2\,
    q(\lambda_i)^2 ((1 - \varepsilon) \lambda_1 - \lambda_i).

With s = λ / ((1 - ε) λ₁) take q = T(√(1 - s)) / √(1 - s), T the Chebyshev polynomial of degree 2k - 1: T is odd, so
that q is a polynomial of degree k - 1 in s. For 0 ≤ s ≤ 1 it has (1 - s) q² = T² ≤ 1, and the right-hand side is at
most (1 - ε) λ₁. At λ₁, 1 - s = -ε / (1 - ε) and |T(i z)| = sinh((2k - 1) arsinh z) give
q² = sinh²((2k - 1) artanh √ε) (1 - ε) / ε. Together, |c₁| ≤ 1 / sinh((2k - 1) artanh √ε). The density of c₁ is at most
√(n / 2π) for n ≥ 3 (and for n = 2 the probability of |c₁| ≤ t is (2/π) arcsin t ≤ t), so that this has at most the
probability √(2n / π) / sinh((2k - 1) artanh √ε). Where that is p, √ε is the tanh of the argument of cosh above, and
1 / (1 - ε) its cosh². ∎

A probability of the order √n exp(-(2k - 1) √ε), in the same way, is in Kuczyński and Woźniakowski, "Estimating the
largest eigenvalue by the power and Lanczos algorithms with a random start", 1992.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["largest_eigenvalue"]


def largest_eigenvalue(
    square: Callable[[Tensor], Tensor], start: Tensor, iterations: int, failure_probability: float
) -> tuple[float, float]:
    """The bounds of the module's docstring.

    Args:
        square: B, shape ``(n,)`` to ``(n,)``, symmetric positive semidefinite.
        start: v, normal in float64, shape ``(n,)``; every later vector is orthogonalised against all.
        iterations: k, at least 1.
        failure_probability: p, of the upper bound.

    Example:
        >>> start = torch.randn(50, dtype=torch.float64)
        >>> low, high = largest_eigenvalue(lambda v: torch.arange(1, 51) * v, start, 20, failure_probability=1e-6)
        >>> low <= 50 <= high < 70
        True
    """
    basis = (start / start.norm())[None]
    images = square(basis[0])[None]
    for _ in range(1, min(iterations, len(start))):
        rest = images[-1] - basis.mT @ (basis @ images[-1])
        rest = rest - basis.mT @ (basis @ rest)  # twice is enough
        if rest.norm() <= 1e-7 * images[-1].norm():  # an invariant subspace: the Ritz values are eigenvalues
            break
        basis = torch.cat([basis, (rest / rest.norm())[None]])
        images = torch.cat([images, square(basis[-1])[None]])
    projected = basis @ images.mT
    ritz = max(0.0, torch.linalg.eigvalsh((projected + projected.mT) / 2)[-1].item())
    slack = math.asinh(math.sqrt(2 * len(start) / math.pi) / failure_probability) / (2 * iterations - 1)
    return ritz, ritz * math.cosh(slack) ** 2
