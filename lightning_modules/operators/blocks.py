"""Operators from their entries: block-diagonal ones, of which a dense matrix is the case of one block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.operators.base import check_size
from pibinn_plugin.storage.recipe import records_arguments
from pibinn_plugin.structure.block_diagonal import multiply_blocks

__all__ = ["BlockOperator", "DenseOperator", "GaussianBlocks", "SignBlocks"]


class BlockOperator(nn.Module):
    """A block-diagonal operator from its blocks.

    Args:
        blocks: shape ``(blocks, rows, columns)``.

    Raises:
        ValueError: not three dimensions, empty, no real numbers, or an entry that is not finite; by ``A`` and
            ``A_adjoint``, a wrong size.

    Example:
        >>> operator = BlockOperator(torch.ones(2, 1, 3))
        >>> operator.shape, operator.A(torch.arange(6.0))
        ((2, 6), tensor([ 3., 12.]))
    """

    blocks: Tensor

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        if blocks.dim() != 3 or not blocks.numel() or not blocks.is_floating_point() or not blocks.isfinite().all():
            raise ValueError(
                f"expected finite blocks (blocks, rows, columns), none of these 0, of real numbers; got "
                f"{blocks.dtype} of shape {tuple(blocks.shape)}"
            )
        self.register_buffer("blocks", blocks, persistent=False)
        self.shape = (blocks.shape[0] * blocks.shape[1], blocks.shape[0] * blocks.shape[2])

    def A(self, x: Tensor) -> Tensor:
        """``A x``: ``(..., unknowns)`` to ``(..., measurements)``."""
        return multiply_blocks(check_size(x, self.shape[1], "x"), self.blocks)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """``Aᵀ y``: ``(..., measurements)`` to ``(..., unknowns)``."""
        return multiply_blocks(check_size(y, self.shape[0], "y"), self.blocks.transpose(1, 2))


class DenseOperator(BlockOperator):
    """An operator from its matrix. Seeded normal entries are `GaussianBlocks` with one block.

    Args:
        matrix: shape ``(measurements, unknowns)``.

    Raises:
        ValueError: not two dimensions, no real numbers, or an entry that is not finite.

    Example:
        >>> DenseOperator(torch.ones(2, 3)).A(torch.arange(3.0))
        tensor([3., 3.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2:
            raise ValueError(f"expected a matrix (measurements, unknowns); got shape {tuple(matrix.shape)}")
        super().__init__(matrix[None])


@records_arguments
class GaussianBlocks(BlockOperator):
    """Independent normal entries in each block, columns of unit norm, from a seed.

    Args:
        blocks: number of blocks.
        rows: measurements of each.
        columns: unknowns of each.
        seed: of the entries.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> GaussianBlocks(blocks=2, rows=4, columns=8).shape
        (8, 16)
    """

    def __init__(self, blocks: int = 8, rows: int = 32, columns: int = 64, seed: int = 0) -> None:
        _check_sizes(blocks, rows, columns)
        entries = torch.randn(blocks, rows, columns, generator=torch.Generator().manual_seed(seed))
        super().__init__(entries / entries.norm(dim=1, keepdim=True))


@records_arguments
class SignBlocks(BlockOperator):
    """Independent entries ±1/√rows in each block (spreading codes, coded apertures, DMD patterns), from a seed.

    Args:
        blocks: number of blocks.
        rows: measurements of each.
        columns: unknowns of each.
        seed: of the entries.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> SignBlocks(blocks=2, rows=4, columns=8).blocks.abs().unique()
        tensor([0.5000])
    """

    def __init__(self, blocks: int = 8, rows: int = 32, columns: int = 64, seed: int = 0) -> None:
        _check_sizes(blocks, rows, columns)
        coins = torch.rand(blocks, rows, columns, generator=torch.Generator().manual_seed(seed))
        super().__init__(torch.where(coins < 0.5, -1.0, 1.0) / rows**0.5)


def _check_sizes(blocks: int, rows: int, columns: int) -> None:
    if min(blocks, rows, columns) < 1:
        raise ValueError(f"blocks={blocks}, rows={rows}, columns={columns}: expected at least 1 of each")
