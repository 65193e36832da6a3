"""What a solver needs of the physics, and what it can find out about any operator from products with it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pibinn_plugin.structure.operator_support import images_of_units

__all__ = ["PhysicsOperator", "check_size", "operator_blocks", "spectral_norm"]

_SUBSPACE, _ITERATIONS = 16, 100


class PhysicsOperator(Protocol):
    """What a solver needs of the physics: the operator, its adjoint, and how many measurements of how many unknowns."""

    shape: tuple[int, int]

    def A(self, x: Tensor) -> Tensor:
        """``(..., unknowns)`` to ``(..., measurements)``."""

    def A_adjoint(self, y: Tensor) -> Tensor:
        """``(..., measurements)`` to ``(..., unknowns)``."""


def check_size(values: Tensor, size: int, name: str) -> Tensor:
    """``values``, if its last axis has this size; transforms would pad or cut anything else without a word.

    Raises:
        ValueError: it has another size.
    """
    if values.dim() == 0 or values.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; expected {size} on the last axis")
    return values


@torch.no_grad()
def operator_blocks(operator: PhysicsOperator) -> Tensor:
    """The matrix of an operator as its blocks, shape ``(blocks, rows, columns)``, in block-diagonal order.

    An operator with an attribute ``blocks`` gives that, and no matrix of all measurements by all unknowns is made; any
    other is probed with its unit vectors, in its own dtype, and is one block.

    Args:
        operator: A.

    Example:
        >>> from lightning_modules.operators import SignBlocks, SubsampledHadamard
        >>> operator_blocks(SignBlocks(blocks=2, rows=4, columns=8)).shape
        torch.Size([2, 4, 8])
        >>> operator_blocks(SubsampledHadamard(rows=4, columns=8)).shape
        torch.Size([1, 4, 8])
    """
    blocks = getattr(operator, "blocks", None)
    if isinstance(blocks, Tensor):
        return blocks
    return torch.cat(list(images_of_units(operator, operator.shape[1]))).T[None].contiguous()


@torch.no_grad()
def spectral_norm(operator: PhysicsOperator) -> float:
    r"""The largest singular value :math:`\lVert A \rVert_2`.

    Exact for an operator with ``blocks``. Otherwise by subspace iteration (Golub and Van Loan, "Matrix Computations",
    8.2.4) from products with A and its adjoint alone; the Ritz value that it returns is never above the norm.

    Args:
        operator: A.

    Example:
        >>> from lightning_modules.operators import SubsampledDCT
        >>> f"{spectral_norm(SubsampledDCT(8, 16)):.4f}"
        '1.0000'
    """
    blocks = getattr(operator, "blocks", None)
    if isinstance(blocks, Tensor):
        return float(torch.linalg.matrix_norm(blocks, 2).max())
    unknowns = operator.shape[1]
    basis = torch.randn(unknowns, min(_SUBSPACE, unknowns), generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(operator.A_adjoint(operator.A(basis.T)).T).Q
    return float(torch.linalg.matrix_norm(operator.A(basis.T), 2))
