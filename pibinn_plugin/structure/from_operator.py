"""`structure_from_operator`: read the structure of a weight off the physics operator it is learned for."""

from typing import Any

import torch
from torch import Tensor

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure.banded import Banded
from pibinn_plugin.structure.base import Structure
from pibinn_plugin.structure.block_diagonal import BlockDiagonal
from pibinn_plugin.structure.dense import Dense
from pibinn_plugin.structure.mask import Mask

_PROBES = 256  # unit vectors given to a matrix-free operator at a time


def structure_from_operator(operator: Any, columns: int | None = None, tolerance: float = 0.0) -> Structure:
    """The structure of a physics operator ``A``, an ``m x n`` matrix.

    Block-diagonal where the support of ``A`` falls into several connected components (up to a permutation of its rows
    and columns, which the structure then holds), otherwise banded where the support fills at least half of a band,
    otherwise its mask; `Dense` where ``A`` has no zero. Use ``.transposed()`` for a weight shaped like the adjoint.

    Args:
        operator: a dense matrix, a torch sparse matrix, or an object with a method ``A`` that maps ``(batch, n)`` to
            ``(batch, m)``; the last is probed with the ``n`` unit vectors.
        columns: ``n``, for a matrix-free operator without a ``shape``.
        tolerance: entries of at most ``tolerance * max|A|`` count as zero.

    Raises:
        StructureError: not a matrix or operator, a NaN or infinite entry, or no nonzero entry at all.

    Example:
        >>> structure_from_operator(torch.block_diag(torch.ones(2, 3), torch.ones(2, 3)))
        BlockDiagonal(blocks=2, rows=None, columns=None, row_order=None, column_order=None)
    """
    rows, columns, row_index, column_index = _support(operator, columns, tolerance)
    if len(row_index) == rows * columns:
        return Dense()
    return (
        _as_blocks(rows, columns, row_index, column_index)
        or _as_band(rows, columns, row_index, column_index)
        or _as_mask(rows, columns, row_index, column_index)
    )


def _support(operator: Any, columns: int | None, tolerance: float) -> tuple[int, int, Tensor, Tensor]:
    """``m``, ``n``, and the row and column index of each nonzero entry."""
    if isinstance(operator, Tensor):
        if operator.dim() != 2:
            raise StructureError(f"expected a matrix; got a tensor of shape {tuple(operator.shape)}")
        coordinates = operator.detach().cpu().to_sparse_coo().coalesce()
        (rows, n), (row_index, column_index) = operator.shape, coordinates.indices()
        values = coordinates.values() if operator.dtype != torch.bool else coordinates.values().int()
    elif callable(getattr(operator, "A", None)):
        rows, n, row_index, column_index, values = _probe(operator, columns)
    else:
        raise StructureError(
            f"expected a matrix or an object with methods A and A_adjoint; got {type(operator).__name__}"
        )
    if not values.isfinite().all():
        raise StructureError("the operator has a NaN or infinite entry")
    magnitudes = values.abs()
    keep = magnitudes > tolerance * magnitudes.max() if len(magnitudes) else magnitudes.bool()
    if not keep.any():
        raise StructureError(f"a {rows} x {n} operator without a nonzero entry has no structure")
    return int(rows), int(n), row_index[keep], column_index[keep]


def _probe(operator: Any, columns: int | None) -> tuple[int, int, Tensor, Tensor, Tensor]:
    if columns is None:
        if not hasattr(operator, "shape"):
            raise StructureError(
                f"{type(operator).__name__} has no shape: pass columns=, the number of unknowns that A maps from"
            )
        columns = int(operator.shape[-1])
    pieces = []
    for start in range(0, columns, _PROBES):
        count = min(_PROBES, columns - start)
        units = torch.zeros(count, columns)
        units[torch.arange(count), start + torch.arange(count)] = 1.0
        images = operator.A(units).detach().cpu().reshape(count, -1)
        unit, row = images.nonzero(as_tuple=True)
        pieces.append((row, unit + start, images[unit, row]))
    row_index, column_index, values = (torch.cat(piece) for piece in zip(*pieces, strict=True))
    return images.shape[1], columns, row_index, column_index, values


def _as_blocks(rows: int, columns: int, row_index: Tensor, column_index: Tensor) -> BlockDiagonal | None:
    label = _connected_components(rows, columns, row_index, column_index)
    # A row or column of zeros belongs to no block: all of them go into empty blocks at the end.
    used_row = torch.zeros(rows, dtype=torch.bool).index_fill(0, row_index, True)
    used_column = torch.zeros(columns, dtype=torch.bool).index_fill(0, column_index, True)
    empty_row, empty_column = rows + columns, rows + columns + 1
    row_label = torch.where(used_row, label[:rows], empty_row)
    column_label = torch.where(used_column, label[rows:], empty_column)
    labels = torch.cat([row_label, column_label]).unique()
    if len(labels) == 1:
        return None
    block_rows, block_columns = _count(row_label, labels), _count(column_label, labels)
    row_order, column_order = row_label.argsort(stable=True), column_label.argsort(stable=True)
    ordered = bool((row_order.diff() == 1).all() and (column_order.diff() == 1).all())
    return BlockDiagonal(
        rows=tuple(block_rows.tolist()),
        columns=tuple(block_columns.tolist()),
        row_order=None if ordered else tuple(row_order.tolist()),
        column_order=None if ordered else tuple(column_order.tolist()),
    )


def _count(values: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros(len(labels), dtype=torch.int64).index_add(
        0, torch.searchsorted(labels, values), torch.ones_like(values)
    )


def _connected_components(rows: int, columns: int, row_index: Tensor, column_index: Tensor) -> Tensor:
    """The smallest node of each node's component in the bipartite graph of rows (first) and columns."""
    label = torch.arange(rows + columns)
    column_node = column_index + rows
    while True:
        least = torch.minimum(label[row_index], label[column_node])
        new = label.clone()
        # The label of a node's label takes part too, which halves the distance to the root in each round.
        for node in (row_index, column_node, label[row_index], label[column_node]):
            new = new.scatter_reduce(0, node, least, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


def _as_band(rows: int, columns: int, row_index: Tensor, column_index: Tensor) -> Banded | None:
    offset = column_index - row_index
    band = Banded(lower=max(0, -int(offset.min())), upper=max(0, int(offset.max())))
    fill = len(row_index) / band.nnz((rows, columns))
    return band if fill >= 0.5 and band.nnz((rows, columns)) < rows * columns else None


def _as_mask(rows: int, columns: int, row_index: Tensor, column_index: Tensor) -> Mask:
    flags = torch.zeros(rows, columns, dtype=torch.bool)
    flags[row_index, column_index] = True
    return Mask(flags)
