"""Geometry of operators too large for a matrix: matrix-free estimates, each with a statement of its error."""

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
from pibinn_plugin.errors import StructureError
from pibinn_plugin.tables import text_table

_FAILURE = 1e-3  # probability with which an upper bound on a singular value may fail

_ESTIMATES = """\
alignment: estimate from {probes} random sign vectors, and its standard error. σ max: {iterations} Lanczos steps; the
upper bound fails with probability {failure} over the start. coherence: of the sampled columns only, a LOWER BOUND.
"""


@dataclass(frozen=True)
class GeometryEstimate:
    """What `estimate_geometry` found, with what is needed to find it again; ``print`` says which number is what."""

    alignment: float
    alignment_error: float
    largest_singular_value: float
    largest_singular_value_bound: float
    coherence: float
    distortion: float
    shape: tuple[int, int]
    sparsity: int
    samples: int
    probes: int
    iterations: int
    seed: int

    def __str__(self) -> str:
        bounds = (self.largest_singular_value, self.largest_singular_value_bound, self.coherence, self.distortion)
        cells = [f"{number:.3f}" for number in (self.alignment, self.alignment_error, *bounds)]
        header = ("alignment", "± s.e.", "σ max ≥", "σ max ≤", "coherence ≥", "δ_s ≥")
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
    r"""The geometry of a weight from products with it alone: estimates and bounds, each with its error.

    Alignment: Hutchinson's means of ``(W z)ᵀ(A z)``, ``‖W z‖²``, ``‖A z‖²`` over random signs z, standard error by the
    delta method. Largest singular value: the Ritz value √θ of k Lanczos steps on WᵀW is never above it (but for
    rounding), and ``σ² > θ / (1 - ε)`` has at most the probability ``1.648 √columns exp(-√ε (2k - 1))`` over the start
    (Kuczyński and Woźniakowski, 1992). Coherence and distortion, as in `Geometry`, of sampled columns: lower bounds.

    Args:
        weight: W by its ``shape``, ``(rows, columns)``, and its products: ``A``, ``(batch, columns)`` to
            ``(batch, rows)``, and ``A_adjoint``, the other way, as deepinv's physics has them.
        operator: A, of the same shape, or with ``adjoint`` of the transposed one.
        adjoint: whether W is to be transposed.
        sparsity: columns in a sample.
        samples: sets of columns.
        probes: random sign vectors.
        iterations: k; the bound is infinite where it is too small to say anything.
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
    forward, backward = (weight.A_adjoint, weight.A) if adjoint else (weight.A, weight.A_adjoint)
    rows, columns = tuple(weight.shape)[::-1] if adjoint else tuple(weight.shape)
    if (rows, columns) != tuple(operator.shape):
        raise StructureError(
            f"with adjoint={adjoint} the weight is {rows} x {columns}; expected the operator's {tuple(operator.shape)}"
        )
    if probes < 2 or iterations < 1:
        raise ValueError(f"probes={probes}, iterations={iterations}: expected at least two probes and one iteration")
    supports = sampled_supports(columns, sparsity, samples, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        signs = torch.randint(2, (probes, columns), generator=generator).to(dtype) * 2 - 1
        alignment = _estimated_alignment(forward(signs).double(), operator.A(signs).double())
        start = torch.randn(columns, generator=generator, dtype=torch.float64)
        ritz = _lanczos(lambda v: backward(forward(v.to(dtype)[None]))[0].double(), start, iterations)
        chosen = (forward(F.one_hot(support, columns).to(dtype)).double() for support in supports)
        grams = [of_support @ of_support.mT for of_support in chosen]
    root = math.log(1.648 * math.sqrt(columns) / _FAILURE) / (2 * iterations - 1)  # √ε
    bound = math.sqrt(ritz / (1 - root**2)) if root < 1 else math.inf
    coherence, distortion = coherence_of(torch.stack(grams)).max().item(), distortion_of(grams).item()
    found = (*alignment, math.sqrt(ritz), bound, coherence, distortion)
    return GeometryEstimate(*found, (rows, columns), sparsity, samples, probes, iterations, seed)


def _estimated_alignment(of_w: Tensor, of_a: Tensor) -> tuple[float, float]:
    inner, w_square, a_square = (of_w * of_a).sum(1), of_w.square().sum(1), of_a.square().sum(1)
    scale = (w_square.mean() * a_square.mean()).sqrt()
    cosine = inner.mean() / scale
    # The first-order change of the ratio with each sample; it vanishes where W is a multiple of A.
    change = inner / scale - cosine / 2 * (w_square / w_square.mean() + a_square / a_square.mean())
    return cosine.item(), (change.std() / math.sqrt(len(inner))).item()


def _lanczos(square: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> float:
    """The largest Ritz value of a symmetric positive semidefinite map; every vector is orthogonalised against all."""
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
    return max(0.0, torch.linalg.eigvalsh((projected + projected.mT) / 2)[-1].item())
