r"""Convergence of iterations too large for their matrices, from products with W and A alone.

The constants of the certificate are exact: column j of G = g W A is g W (A e_j), and each column is used and dropped.
‖I - g W A‖₂ has two bounds by the Lanczos iteration. Time goes with n products; memory with ``chunk`` × n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pibinn_plugin.analysis.convergence import LayerConstants, column_factors
from pibinn_plugin.analysis.lanczos import largest_eigenvalue
from pibinn_plugin.errors import StructureError

__all__ = ["constants_from_products", "contraction_from_products"]


def constants_from_products(
    weights: Sequence[Any], operator: Any, step_sizes: Tensor, chunk: int = 256, dtype: torch.dtype = torch.float32
) -> LayerConstants:
    """d, μ, C and ρ of each layer, as `pibinn_plugin.analysis.convergence.layer_constants` has them, as one block.

    Args:
        weights: W_k by their ``A``, ``(batch, m)`` to ``(batch, n)``.
        operator: A by its ``shape`` (m, n) and its ``A``, ``(batch, n)`` to ``(batch, m)``.
        step_sizes: g_k, shape ``(layers,)``.
        chunk: columns at one time.
        dtype: of the products, which are taken on the CPU.

    Raises:
        StructureError: not as many weights as step sizes, or a product that is not finite or has another shape.

    Example:
        >>> from types import SimpleNamespace
        >>> A = SimpleNamespace(shape=(4, 4), A=lambda x: x + 0.1 * x.roll(1, -1))
        >>> constants_from_products([SimpleNamespace(A=lambda y: y)], A, torch.ones(1)).largest_sparsity.item()
        4
    """
    if len(weights) != len(step_sizes) or not len(weights):
        raise StructureError(f"{len(weights)} weights and {len(step_sizes)} step sizes; expected as many of both")
    with torch.no_grad():
        layers = [
            _constants(weight, operator, float(step_size), chunk, dtype)
            for weight, step_size in zip(weights, step_sizes, strict=True)
        ]
    return LayerConstants(*(torch.stack(values)[:, None] for values in zip(*layers, strict=True)))


def _constants(
    weight: Any, operator: Any, step_size: float, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = operator.shape
    row_sums = torch.zeros(n, dtype=torch.float64)
    for units, _ in _unit_vectors(m, chunk, dtype):
        row_sums += step_size * _finite(weight.A(units), (len(units), n)).abs().sum(0)
    diagonal = coherence = torch.zeros((), dtype=torch.float64)
    factors = torch.zeros(n + 1, dtype=torch.float64)
    for units, index in _unit_vectors(n, chunk, dtype):
        columns = step_size * _finite(weight.A(operator.A(units)), (len(units), n))
        rows = torch.arange(len(units))
        own = (1 - columns[rows, index]).abs()
        columns[rows, index] = 0
        others = columns.abs()
        diagonal, coherence = torch.maximum(diagonal, own.max()), torch.maximum(coherence, others.max())
        factors = torch.maximum(factors, column_factors(own, others.mT))
    return diagonal, coherence, row_sums.abs().max(), factors


def _unit_vectors(size: int, chunk: int, dtype: torch.dtype) -> Any:
    for index in torch.arange(size).split(chunk):
        yield torch.nn.functional.one_hot(index, size).to(dtype), index


def _finite(product: Tensor, shape: tuple[int, int]) -> Tensor:
    if product.shape != shape or not product.isfinite().all():
        raise StructureError(f"a product has the shape {tuple(product.shape)}; expected finite numbers, {shape}")
    return product.detach().double()


def contraction_from_products(
    weight: Any,
    operator: Any,
    step_size: float,
    iterations: int = 60,
    failure_probability: float = 1e-6,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """Bounds of ‖I - g W A‖₂, the Lipschitz constant of a layer with a nonexpansive proximal map.

    Args:
        weight: W by its ``shape`` (n, m) and its products ``A`` and ``A_adjoint``, as deepinv's physics has them.
        operator: A by the same, of the shape (m, n).
        step_size: g.
        iterations: of the Lanczos iteration.
        failure_probability: of the upper bound, over the random start.
        generator: of the start.
        dtype: of the products, which are taken on the CPU.

    Raises:
        StructureError: shapes that do not fit.
        ValueError: fewer than one iteration, or a probability outside (0, 1).

    Example:
        >>> from types import SimpleNamespace
        >>> identity = SimpleNamespace(shape=(90, 90), A=lambda x: x, A_adjoint=lambda y: y)
        >>> low, high = contraction_from_products(identity, identity, step_size=0.25)
        >>> round(low, 6), high < 0.8
        (0.75, True)
    """
    m, n = operator.shape
    if tuple(weight.shape) != (n, m):
        raise StructureError(f"the weight is {tuple(weight.shape)}; expected {(n, m)}, for an operator of {(m, n)}")
    if iterations < 1 or not 0 < failure_probability < 1:
        raise ValueError(
            "expected at least one iteration and a probability between 0 and 1; "
            f"got {iterations} and {failure_probability}"
        )

    def square(v: Tensor) -> Tensor:
        x = v.to(dtype)[None]
        image = x - step_size * weight.A(operator.A(x))
        return (image - step_size * operator.A_adjoint(weight.A_adjoint(image)))[0].double()

    with torch.no_grad():
        start = torch.randn(n, generator=generator, dtype=torch.float64)
        low, high = largest_eigenvalue(square, start, iterations, failure_probability)
    return math.sqrt(low), math.sqrt(high)
