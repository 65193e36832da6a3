"""SparseSigns: a few entries ±1/√nonzeros in each column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.operators.base import check_size
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["SparseSigns"]

_COLUMNS_AT_A_TIME = 1024


@records_arguments
class SparseSigns(nn.Module):
    """The same number of entries ±1/√nonzeros in each column, at random rows, from a seed; zero elsewhere.

    Such operators sense sparse signals like dense ones at a fraction of the work (Gilbert and Indyk, "Sparse Recovery
    Using Sparse Matrices", Proceedings of the IEEE 98, 2010). Stored are the row and sign of each nonzero.

    Args:
        rows: measurements.
        columns: unknowns.
        nonzeros: of each column.
        seed: of rows and signs.

    Raises:
        ValueError: sizes below 1, or more nonzeros than rows; by ``A`` and ``A_adjoint``, a wrong size.

    Example:
        >>> from pibinn_plugin import structure_from_operator
        >>> operator = SparseSigns(rows=16, columns=32, nonzeros=4)
        >>> operator.shape, structure_from_operator(operator.matrix()).nnz(operator.shape)
        ((16, 32), 128)
    """

    row_index: Tensor
    values: Tensor

    def __init__(self, rows: int = 256, columns: int = 512, nonzeros: int = 6, seed: int = 0) -> None:
        super().__init__()
        if min(rows, columns, nonzeros) < 1 or nonzeros > rows:
            raise ValueError(
                f"rows={rows}, columns={columns}, nonzeros={nonzeros}: expected at least 1 of each, and at most as "
                f"many nonzeros in a column as rows"
            )
        generator = torch.Generator().manual_seed(seed)
        starts = range(0, columns, _COLUMNS_AT_A_TIME)
        counts = [min(_COLUMNS_AT_A_TIME, columns - start) for start in starts]
        chosen = [torch.rand(count, rows, generator=generator).topk(nonzeros).indices for count in counts]
        coins = torch.rand(columns, nonzeros, generator=generator)
        self.shape = (rows, columns)
        self.register_buffer("row_index", torch.cat(chosen), persistent=False)
        self.register_buffer("values", torch.where(coins < 0.5, -1.0, 1.0) / nonzeros**0.5, persistent=False)

    def A(self, x: Tensor) -> Tensor:
        """``A x``: ``(..., unknowns)`` to ``(..., measurements)``."""
        contributions = (check_size(x, self.shape[1], "x")[..., None] * self.values).flatten(-2)
        return x.new_zeros((*x.shape[:-1], self.shape[0])).index_add(-1, self.row_index.flatten(), contributions)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """``Aᵀ y``: ``(..., measurements)`` to ``(..., unknowns)``."""
        gathered = check_size(y, self.shape[0], "y").index_select(-1, self.row_index.flatten())
        return (gathered.unflatten(-1, self.row_index.shape) * self.values).sum(-1)

    def matrix(self) -> Tensor:
        """A as a sparse matrix (COO), whose support `structure_from_operator` reads."""
        column_index = torch.arange(self.shape[1], device=self.row_index.device).repeat_interleave(self.values.shape[1])
        indices = torch.stack([self.row_index.flatten(), column_index])
        return torch.sparse_coo_tensor(indices, self.values.flatten(), self.shape, check_invariants=True)
