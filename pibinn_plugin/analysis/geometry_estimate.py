r"""Geometry of operators too large for a matrix: matrix-free estimates, each with a statement of its error.

- Alignment: Hutchinson's means of ``(W z)ᵀ(A z)``, ``‖W z‖²``, ``‖A z‖²`` over random signs z, standard error by the
  delta method.
- Largest singular value: by the Lanczos iteration on WᵀW, see `pibinn_plugin.analysis.lanczos`.
- Principal angles: with P and Q the orthogonal projections on the row spaces of W and A, by conjugate gradients, the
  mean of cos² is tr(P Q) / min(tr P, tr Q), estimated as the alignment is. The sine of the largest angle is
  ‖(I - Q) P‖₂ where the rank of W is not the larger one, ‖(I - P) Q‖₂ otherwise: a Ritz value.
- Coherence and distortion, as in `Geometry`, of sampled columns: lower bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pibinn_plugin.analysis.geometry import (
    SAMPLING_LEGEND,
    coherence_of,
    distortion_of,
    sampled_supports,
)
from pibinn_plugin.analysis.lanczos import largest_eigenvalue
from pibinn_plugin.errors import StructureError
from pibinn_plugin.tables import text_table

_FAILURE = 1e-3  # probability with which an upper bound on a singular value may fail

_ESTIMATES = """\
alignment, mean cos²: estimates from {probes} random sign vectors, and their standard errors. σ max: {iterations}
Lanczos steps; the upper bound fails with probability {failure} over the start. cos², angle: of the principal angles
between the row spaces, the mean and the largest, in degrees; a Ritz value of as many steps, which but for the errors of
the projections (a few degrees in float32) is not above it. nan: conjugate gradients did not reach the row spaces.
coherence: of the sampled columns only, a LOWER BOUND.
"""


@dataclass(frozen=True)
class GeometryEstimate:
    """What `estimate_geometry` found, with what is needed to find it again; ``print`` says which number is what."""

    alignment: float
    alignment_error: float
    largest_singular_value: float
    largest_singular_value_bound: float
    mean_squared_cosine: float
    mean_squared_cosine_error: float
    largest_angle: float
    coherence: float
    distortion: float
    shape: tuple[int, int]
    sparsity: int
    samples: int
    probes: int
    iterations: int
    seed: int

    def __str__(self) -> str:
        singular = (self.largest_singular_value, self.largest_singular_value_bound)
        cosine = (self.mean_squared_cosine, self.mean_squared_cosine_error)
        numbers = (self.alignment, self.alignment_error, *singular, *cosine)
        cells = [f"{number:.3f}" for number in numbers] + [f"{math.degrees(self.largest_angle):.1f}"]
        cells += [f"{number:.3f}" for number in (self.coherence, self.distortion)]
        header = ("alignment", "± s.e.", "σ max ≥", "σ max ≤", "mean cos²", "± s.e.", "angle ≈", "coherence ≥", "δ_s ≥")
        legend = (_ESTIMATES + SAMPLING_LEGEND).format(**vars(self), failure=_FAILURE)
        return text_table(["weight", *header], [["x".join(map(str, self.shape)), *cells]]) + legend


def estimate_geometry(
    weight: Any,
    operator: Any,
    adjoint: bool = False,
    sparsity: int = 8,
    samples: int = 100,
    probes: int = 100,
    iterations: int = 60,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> GeometryEstimate:
    """The geometry of a weight from products with it alone: estimates and bounds, each with its error.

    What each number is: the module's docstring.

    Args:
        weight: W by its ``shape``, ``(rows, columns)``, and its products: ``A``, ``(batch, columns)`` to
            ``(batch, rows)``, and ``A_adjoint``, the other way, as deepinv's physics has them.
        operator: A, of the same shape, or with ``adjoint`` of the transposed one.
        adjoint: whether W is to be transposed.
        sparsity: columns in a sample.
        samples: sets of columns.
        probes: random sign vectors.
        iterations: of the Lanczos iteration; those of conjugate gradients are ten times as many at most.
        seed: of all draws.
        dtype: of the products, which are taken on the CPU.

    Raises:
        StructureError: the shapes differ.
        ValueError: a sparsity outside ``1 ... columns``, no sample or iteration, or fewer than two probes.

    Example:
        >>> from types import SimpleNamespace
        >>> D = SimpleNamespace(shape=(99, 99), A=lambda x: x - x.roll(1, -1), A_adjoint=lambda y: y - y.roll(-1, -1))
        >>> estimate = estimate_geometry(D, D)
        >>> f"{estimate.alignment:.3f} {estimate.alignment_error:.3f} {estimate.largest_singular_value:.2f}"
        '1.000 0.000 2.00'
    """
    of_weight, of_operator = _fitting_products(weight, operator, adjoint, dtype)
    columns = operator.shape[1]
    if probes < 2 or iterations < 1:
        raise ValueError(f"probes={probes}, iterations={iterations}: expected at least two probes and one iteration")
    supports = sampled_supports(columns, sparsity, samples, seed)
    signs, start = _drawn(probes, columns, seed)
    with torch.no_grad():
        alignment = _estimated_cosine(of_weight.forward(signs), of_operator.forward(signs))
        singular = largest_eigenvalue(of_weight.square, start, iterations, _FAILURE)
        angles = _row_space_angles(of_weight, of_operator, signs, start, iterations)
        grams = [_gram(of_weight.forward(F.one_hot(support, columns))) for support in supports]
    return GeometryEstimate(
        *alignment,
        *(math.sqrt(singular[0]), math.sqrt(singular[1])),
        *angles,
        *(coherence_of(torch.stack(grams)).max().item(), distortion_of(grams).item()),
        shape=(operator.shape[0], columns),
        sparsity=sparsity,
        samples=samples,
        probes=probes,
        iterations=iterations,
        seed=seed,
    )


def _gram(columns: Tensor) -> Tensor:
    return columns @ columns.mT


def _drawn(probes: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random sign vectors (probes, columns), and where the Lanczos iteration starts."""
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(2, (probes, columns), generator=generator) * 2 - 1).double()
    return signs, torch.randn(columns, generator=generator, dtype=torch.float64)


def _fitting_products(weight: Any, operator: Any, adjoint: bool, dtype: torch.dtype) -> tuple[_Products, _Products]:
    of_weight, shape = _Products(weight.A, weight.A_adjoint, dtype), tuple(weight.shape)
    if adjoint:
        of_weight, shape = _Products(weight.A_adjoint, weight.A, dtype), shape[::-1]
    if shape != tuple(operator.shape):
        raise StructureError(
            f"with adjoint={adjoint} the weight is {' x '.join(map(str, shape))}; expected the operator's "
            f"{tuple(operator.shape)}"
        )
    return of_weight, _Products(operator.A, operator.A_adjoint, dtype)


@dataclass(frozen=True)
class _Products:
    """Products with a matrix and its transpose in one dtype, given and returned in float64, batches as rows."""

    times: Callable[[Tensor], Tensor]
    transposed_times: Callable[[Tensor], Tensor]
    dtype: torch.dtype

    @property
    def residual(self) -> float:
        """Relative, of a projection: what the products are good for."""
        return math.sqrt(torch.finfo(self.dtype).eps)

    def square(self, v: Tensor) -> Tensor:
        """AᵀA of one vector."""
        return self.backward(self.forward(v[None]))[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.times(x.to(self.dtype)).double()

    def backward(self, y: Tensor) -> Tensor:
        return self.transposed_times(y.to(self.dtype)).double()

    def project(self, z: Tensor, iterations: int) -> Tensor:
        """The projection of each row of z on the row space, Aᵀ c with c of least squares; NaN where not reached."""
        projection, rest = torch.zeros_like(z), z  # z - projection
        gradient = direction = self.forward(z)
        square = allowed = gradient.square().sum(-1)
        for _ in range(iterations):
            if (square <= self.residual**2 * allowed).all():
                break
            step = self.backward(direction)
            length = square / step.square().sum(-1).clamp_min(torch.finfo(square.dtype).tiny)
            projection, rest = projection + length[:, None] * step, rest - length[:, None] * step
            gradient = self.forward(rest)
            following = gradient.square().sum(-1)
            direction = gradient + (following / square.clamp_min(torch.finfo(square.dtype).tiny))[:, None] * direction
            square = following
        reached = square <= self.residual**2 * allowed
        return torch.where(reached[:, None], projection, torch.nan)


def _row_space_angles(
    weight: _Products, operator: _Products, signs: Tensor, start: Tensor, iterations: int
) -> tuple[float, float, float]:
    """Mean of cos² of the principal angles, its standard error, and the largest angle by its Ritz value."""
    steps = 10 * iterations
    of_weight, of_operator = weight.project(signs, steps), operator.project(signs, steps)
    if not (of_weight.isfinite().all() and of_operator.isfinite().all()):
        return math.nan, math.nan, math.nan
    ranks = [projected.square().sum(1) for projected in (of_weight, of_operator)]
    smaller, larger = (weight, operator) if ranks[0].mean() <= ranks[1].mean() * (1 + 1e-6) else (operator, weight)
    rank = min(ranks, key=lambda squares: float(squares.mean()))
    overlap = (of_weight * of_operator).sum(1)
    mean = overlap.mean() / rank.mean()
    error = ((overlap - mean * rank) / rank.mean()).std() / math.sqrt(len(overlap))

    def outside(v: Tensor) -> Tensor:  # P (I - Q) P
        inside = smaller.project(v[None], steps)
        return smaller.project(inside - larger.project(inside, steps), steps)[0].nan_to_num()

    sine_square = largest_eigenvalue(outside, start, iterations, _FAILURE)[0]
    return mean.item(), error.item(), math.asin(math.sqrt(min(1.0, sine_square)))


def _estimated_cosine(of_w: Tensor, of_a: Tensor) -> tuple[float, float]:
    inner, w_square, a_square = (of_w * of_a).sum(1), of_w.square().sum(1), of_a.square().sum(1)
    scale = (w_square.mean() * a_square.mean()).sqrt()
    cosine = inner.mean() / scale
    # The first-order change of the ratio with each sample; it vanishes where W is a multiple of A.
    change = inner / scale - cosine / 2 * (w_square / w_square.mean() + a_square / a_square.mean())
    return cosine.item(), (change.std() / math.sqrt(len(inner))).item()
