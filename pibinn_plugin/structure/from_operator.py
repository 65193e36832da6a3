"""`structure_from_operator`: read the structure of a weight off the physics operator it is learned for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure.banded import Banded
from pibinn_plugin.structure.base import Structure
from pibinn_plugin.structure.block_diagonal import BlockDiagonal
from pibinn_plugin.structure.components import components
from pibinn_plugin.structure.dense import Dense
from pibinn_plugin.structure.mask import Mask
from pibinn_plugin.structure.operator_support import OperatorSupport, SmallEntriesWarning, operator_support

_LEAST_MASK = 20  # bytes: no mask is stored in fewer


def structure_from_operator(operator: Any, columns: int | None = None, tolerance: float | None = None) -> Structure:
    """The structure of a physics operator ``A``, an ``m x n`` matrix: the one of the fewest nonzeros.

    That is its support. It is described in the fewest bytes: as dense, as a band, as blocks (equal or uneven, up to a
    permutation of rows and columns, which the structure then holds) or as a mask. Rows and columns of zeros are in no
    block. Use ``.transposed()`` for a weight shaped like the adjoint.

    Rounding of the operator's own computation, such as that of an FFT, is no support. Entries count as zero that are
    at most ``2 eps log2(max(m, n, 16))`` times the largest entry of their connected component, eps being that of the
    operator's dtype, and that do not look like the lower end of larger entries; `operator_support` says how.

    Args:
        operator: a dense matrix, a torch sparse matrix, or an object with a method ``A`` that maps ``(batch, n)`` to
            ``(batch, m)``; the last is probed with the ``n`` unit vectors, in the dtype of the tensors it holds.
        columns: ``n``, for a matrix-free operator without a ``shape``.
        tolerance: instead, entries of at most ``tolerance * max|A|`` count as zero; 0 keeps all.

    Warns:
        SmallEntriesWarning: nonzero entries were taken for rounding: how many, the largest of them, and the smallest
            entry that was kept; not with a tolerance that was given.

    Raises:
        StructureError: not a matrix or operator, one that is complex or not linear, a ``columns`` or a ``shape`` that
            is not what it has, a NaN or infinite entry, or no nonzero entry at all.

    Example:
        >>> structure_from_operator(torch.block_diag(torch.ones(2, 3), torch.ones(2, 3)))
        BlockDiagonal(blocks=2, rows=None, columns=None, row_order=None, column_order=None)
    """
    support = operator_support(operator, columns, tolerance)
    if support.dropped and tolerance is None:
        warnings.warn(SmallEntriesWarning(support), stacklevel=2)
    best = min(_rules(support), key=lambda rule: len(rule.to_bytes()), default=None)
    if best is not None and len(best.to_bytes()) <= _LEAST_MASK:
        return best
    try:
        mask = _as_mask(support)
    except StructureError:  # of more elements than a mask may have
        if best is None:
            raise
        return best
    return mask if best is None or len(mask.to_bytes()) < len(best.to_bytes()) else best


def _rules(support: OperatorSupport) -> Iterator[Structure]:
    """The structures other than a mask that are exactly this support."""
    shape, nnz = (support.rows, support.columns), len(support.row_index)
    if nnz == support.rows * support.columns:
        yield Dense()
        return
    offset = support.column_index - support.row_index
    band = Banded(lower=max(0, -int(offset.min())), upper=max(0, int(offset.max())))
    if band.nnz(shape) == nnz:
        yield band
    blocks = _as_blocks(support)
    if blocks.nnz(shape) == nnz:
        yield blocks


def _as_blocks(support: OperatorSupport) -> BlockDiagonal:
    """The connected components as blocks, and between them blocks without rows or columns for those of zeros."""
    row_label, column_label = components(support.rows, support.columns, support.row_index, support.column_index)
    row_place = _places(row_label, support.row_index, 1)
    column_place = _places(column_label, support.column_index, 2)
    places = torch.cat([row_place, column_place]).unique()
    row_order, column_order = row_place.argsort(stable=True), column_place.argsort(stable=True)
    is_ordered = bool((row_order.diff() == 1).all() and (column_order.diff() == 1).all())
    return BlockDiagonal(
        rows=_counts(row_place, places),
        columns=_counts(column_place, places),
        row_order=None if is_ordered else tuple(row_order.tolist()),
        column_order=None if is_ordered else tuple(column_order.tolist()),
    )


def _places(label: Tensor, used: Tensor, empty: int) -> Tensor:
    """Where the rows (or columns) stand: with their component; those of zeros behind it, ``empty`` of three steps."""
    is_used = torch.zeros(len(label), dtype=torch.bool, device="cpu").index_fill(0, used, True)
    last_used = torch.where(is_used, torch.arange(len(label), device="cpu"), -1).cummax(0).values
    place = torch.where(last_used >= 0, 3 * label[last_used.clamp(min=0)], -3)
    return torch.where(is_used, place, place + empty)


def _counts(place: Tensor, places: Tensor) -> tuple[int, ...]:
    return tuple(torch.bincount(torch.searchsorted(places, place), minlength=len(places)).tolist())


def _as_mask(support: OperatorSupport) -> Mask:
    positions = support.row_index * support.columns + support.column_index
    return Mask.from_positions(positions.sort().values, (support.rows, support.columns))
