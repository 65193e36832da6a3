"""CalibratedAMP: the operator itself is learned, and every iteration uses it forward and as adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lightning_modules.solvers.message_passing import MessagePassing
from lightning_modules.solvers.structured_layer import layer_of
from pibinn_plugin.packed import PackedCompactLinear, PackedLinear
from pibinn_plugin.storage.recipe import records_arguments
from pibinn_plugin.structure import BlockDiagonal, Structure
from pibinn_plugin.structure.base import constant
from pibinn_plugin.structure.block_diagonal import multiply_blocks

__all__ = ["CalibratedAMP"]

_LinearMap = Callable[[Tensor], Tensor]


@records_arguments
class CalibratedAMP(nn.Module):
    r"""Sparse recovery from y = A x + noise where only the support M of A is known: its entries are the one weight Â.

    `MessagePassing` with the correction :math:`g_k Â^T r` and A replaced by Â throughout. One bit for each entry,
    :math:`Â = λ \, \mathrm{sign}(V) ⊙ M`, is right for binary physics: spreading codes, coded apertures, projections.

    Args:
        measurements: m.
        unknowns: n.
        structure: M, of the m × n weight.
        layers: K.

    Raises:
        StructureError: the structure does not fit.
        ValueError: fewer than one layer; or, by ``forward``, measurements of another size.

    Example:
        >>> from pibinn_plugin import BlockDiagonal
        >>> solver = CalibratedAMP(measurements=8, unknowns=16, structure=BlockDiagonal(2), layers=3)
        >>> solver.operator.weight.shape, solver(torch.zeros(5, 8)).shape
        (torch.Size([2, 4, 8]), torch.Size([5, 16]))
    """

    def __init__(self, measurements: int, unknowns: int, structure: Structure, layers: int = 12) -> None:
        super().__init__()
        self.shape = (measurements, unknowns)
        self.operator = layer_of(structure, measurements, unknowns)
        self.iteration = MessagePassing(layers, _equal_blocks(structure))
        self.step_sizes = nn.Parameter(torch.full((layers,), 0.35))
        self.structure, self._adjoint_structure = structure, structure.transposed()
        # Blocks in their order are transposed without an index for each element.
        self._transposition = None if _are_ordered_blocks(structure) else _transposition(structure, self.shape)
        with torch.no_grad():
            # Columns of about unit norm.
            nn.init.normal_(self.operator.weight, std=(unknowns / structure.nnz(self.shape)) ** 0.5)

    def forward(self, y: Tensor) -> Tensor:
        """Recover the unknowns.

        Args:
            y: measurements, shape ``(batch, measurements)``.

        Returns:
            The estimate, shape ``(batch, unknowns)``.
        """
        measurements, unknowns = self.shape
        if y.shape[-1] != measurements:
            raise ValueError(f"y has shape {tuple(y.shape)}; the operator gives {measurements} measurements")
        operator, adjoint = self._maps(y)
        return self.iteration(y, unknowns, operator, lambda k, residual: self.step_sizes[k] * adjoint(residual))

    def _maps(self, y: Tensor) -> tuple[_LinearMap, _LinearMap]:
        """Â and its adjoint."""
        if isinstance(self.operator, PackedLinear | PackedCompactLinear) and self.operator.stays_packed(y):
            return self.operator, self.operator.adjoint
        # Once: a packed weight is unpacked, a latent quantized, at every access.
        weight = self.operator.weight
        if self._transposition is None:
            transposed_blocks = weight.transpose(1, 2)
            return lambda x: multiply_blocks(x, weight), lambda residual: multiply_blocks(residual, transposed_blocks)
        transposed = weight.flatten()[constant(self._transposition, weight.device)]
        return (
            lambda x: self.structure.linear(x, weight, self.shape),
            lambda residual: self._adjoint_structure.linear(residual, transposed, self.shape[::-1]),
        )


def _equal_blocks(structure: Structure) -> int:
    """How many equal blocks of y depend on as many of x, in their order; 1 where the structure says no such thing."""
    return structure.blocks or 1 if _are_ordered_blocks(structure) else 1


def _are_ordered_blocks(structure: Structure) -> TypeGuard[BlockDiagonal]:
    return isinstance(structure, BlockDiagonal) and structure == BlockDiagonal(structure.blocks)


def _transposition(structure: Structure, shape: tuple[int, int]) -> Tensor:
    """Where the flat compact form of Wᵀ finds its elements in that of W."""
    with torch.device("cpu"):
        rows, columns = shape
        positions, order = structure.positions(shape).sort()
        transposed = structure.transposed().positions((columns, rows))
        return order[torch.searchsorted(positions, transposed % rows * columns + transposed // rows)]
