"""Where a physics operator is not zero: its entries, without those that are rounding of its own computation.

An operator that computes by FFT gives numbers of about 1e-8 where its matrix has zeros. Such entries are told from
small ones that are meant by three facts.

Rounding is bounded. The bound of sums that are taken pairwise, and of the FFT, is ``eps log2(N)`` times what is summed
(Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapters 4 and 24); twice that is the tolerance. The
eps is that of the dtype. Before a dtype coarser than float32 that of float32 is tried, in which torch accumulates; and
it is tried for float64 too where every entry is a float32.

Rounding comes with what is summed. So an entry is compared with the largest one of its connected component: a block or
a row in a unit of its own is not small because another block is large.

Rounding is a population of its own. Entries that are the lower end of larger ones, as in any matrix of random numbers,
have many more of them just above the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure.components import components

_PROBES = 256  # unit vectors given to a matrix-free operator at a time
_FEWEST_SUMMED = 16  # small operators round no less than those of 16 unknowns
_GAP = 1000  # from the tolerance up: where the larger entries are that small ones would be the lower end of

Entries = tuple[Tensor, Tensor, Tensor]  # row index, column index, magnitude


class SmallEntriesWarning(UserWarning):
    """Nonzero entries of an operator were taken for rounding.

    Args:
        support: what was kept, and what was not.
    """

    def __init__(self, support: OperatorSupport) -> None:
        nonzeros = support.dropped + len(support.row_index)
        super().__init__(
            f"{support.dropped} of the {nonzeros} nonzero entries of the operator are taken for rounding, up to "
            f"{support.largest_dropped:.3g}; the smallest that is kept is {support.smallest_kept:.3g}. "
            f"Pass tolerance=0 to keep them all, or the tolerance that is right"
        )
        self.support = support


@dataclass(frozen=True, eq=False)
class OperatorSupport:
    """The entries of an ``m x n`` operator that are not zero, and a report of those that were taken as zero.

    Args:
        rows: m.
        columns: n.
        row_index: int64, of each entry.
        column_index: int64, of each entry.
        dropped: the number of nonzero entries that were taken as zero.
        largest_dropped: the largest magnitude of those, 0 if there are none.
        smallest_kept: the smallest magnitude of the others.
        is_rounding: whether what was dropped looks like rounding, as the module says.
    """

    rows: int
    columns: int
    row_index: Tensor
    column_index: Tensor
    dropped: int
    largest_dropped: float
    smallest_kept: float
    is_rounding: bool


@dataclass(frozen=True)
class _Matrix:
    """What there is to know of a matrix or an operator, and its nonzero entries, whole columns at a time.

    Args:
        rows: m.
        columns: n.
        precisions: the dtypes in which it may have been computed, finest first.
        entries: gives the entries anew.
    """

    rows: int
    columns: int
    precisions: list[torch.dtype]
    entries: Callable[[], Iterator[Entries]]


def operator_support(operator: Any, columns: int | None = None, tolerance: float | None = None) -> OperatorSupport:
    """The entries of a physics operator that are not zero.

    Args:
        operator: as of `structure_from_operator`.
        columns: as of `structure_from_operator`.
        tolerance: entries of at most ``tolerance * max|A|`` are taken as zero; by default those that are rounding.

    Raises:
        StructureError: as `structure_from_operator` does.

    Example:
        >>> noisy = torch.eye(4) + 3e-8
        >>> support = operator_support(noisy)
        >>> support.dropped, len(support.row_index), f"{support.largest_dropped:.0e}", support.smallest_kept
        (12, 4, '3e-08', 1.0)
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise StructureError(f"tolerance={tolerance}: expected a fraction of the largest entry, at least 0 and below 1")
    matrix = _matrix_of(operator, columns)
    if tolerance is not None:
        return _split(matrix, tolerance, by_component=False)
    summed = max(matrix.rows, matrix.columns, _FEWEST_SUMMED)
    support = None
    for dtype in matrix.precisions:
        support = _split(matrix, 2 * _eps(dtype) * math.log2(summed), by_component=True)
        if support.is_rounding:
            return support
    return _split(matrix, 0.0, by_component=False) if support is None or support.dropped else support


def images_of_units(operator: Any, columns: int) -> Iterator[Tensor]:
    """The columns of the matrix of an operator, some at a time: ``A`` of the unit vectors, in the operator's dtype.

    Args:
        operator: an object with a method ``A`` that maps ``(batch, columns)`` to ``(batch, rows)``.
        columns: the number of unknowns.

    Returns:
        shape ``(unit vectors, rows)``, as ``A`` gives it.
    """
    like = _like(operator)
    for start in range(0, columns, _PROBES):
        units = like.new_zeros(min(_PROBES, columns - start), columns)
        units.diagonal(start).fill_(1.0)
        with torch.no_grad():
            yield operator.A(units)


def _like(operator: Any) -> Tensor:
    """An empty tensor of the real dtype and on the device that an operator computes in and on."""
    held = (*operator.parameters(), *operator.buffers()) if isinstance(operator, torch.nn.Module) else ()
    tensors = [
        value
        for value in held or getattr(operator, "__dict__", {}).values()
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    ]
    if not tensors:
        return torch.empty(0)
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.empty(0, dtype=dtype.to_real(), device=tensors[0].device)


def _matrix_of(operator: Any, columns: int | None) -> _Matrix:
    if isinstance(operator, Tensor):
        return _of_tensor(operator, columns)
    if callable(getattr(operator, "A", None)):
        return _of_operator(operator, columns)
    raise StructureError(f"expected a matrix or an object with methods A and A_adjoint; got {type(operator).__name__}")


def _of_tensor(matrix: Tensor, columns: int | None) -> _Matrix:
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise StructureError(f"expected a matrix with entries; got a tensor of shape {tuple(matrix.shape)}")
    if columns is not None and columns != matrix.shape[1]:
        raise StructureError(f"columns={columns}, but the matrix has shape {tuple(matrix.shape)}")
    _refuse_complex(matrix.dtype)
    coordinates = matrix.detach().cpu().to_sparse_coo().coalesce()
    (row_index, column_index), values = coordinates.indices(), coordinates.values()
    precisions = _precisions(matrix.dtype)
    if matrix.dtype == torch.float64 and torch.equal(values.float().double(), values):
        precisions.append(torch.float32)  # computed in float32, and only stored in float64
    entries = _nonzero(row_index, column_index, values)
    return _Matrix(matrix.shape[0], matrix.shape[1], precisions, lambda: iter([entries]))


def _of_operator(operator: Any, columns: int | None) -> _Matrix:
    name, shape = type(operator).__name__, tuple(getattr(operator, "shape", ()))
    if columns is None and len(shape) != 2:
        raise StructureError(f"{name} has no shape (m, n): pass columns=, the number of unknowns that A maps from")
    if columns is not None and shape and columns != shape[-1]:
        raise StructureError(f"columns={columns}, but {name} has shape {shape}")
    count = int(shape[-1]) if columns is None else columns
    if count < 1:
        raise StructureError(f"{name} has {count} unknowns; expected at least one")
    zero = _like(operator).new_zeros(1, count)
    with torch.no_grad():
        image = operator.A(zero)
    if image.shape[:1] != (1,) or (len(shape) == 2 and image.numel() != shape[0]):
        raise StructureError(
            f"A of {name} maps one row of {count} unknowns to a tensor of shape {tuple(image.shape)}; expected one row"
            + (f" of {shape[0]} measurements" if shape else "")
        )
    _refuse_complex(image.dtype)
    if image.count_nonzero():
        raise StructureError(f"{name} is not linear: A of zero is not zero")
    coarser = max(zero.dtype, image.dtype, key=_eps)

    def entries() -> Iterator[Entries]:
        start = 0
        for images in images_of_units(operator, count):
            flat = images.cpu().reshape(len(images), -1)
            unit, row = flat.nonzero(as_tuple=True)
            yield _nonzero(row, unit + start, flat[unit, row])
            start += len(images)

    return _Matrix(image.numel(), count, _precisions(coarser), entries)


def _refuse_complex(dtype: torch.dtype) -> None:
    if dtype.is_complex:
        raise StructureError(
            f"the operator is {dtype}, and weights are real: give real and imaginary parts as measurements of their "
            f"own (torch.view_as_real)"
        )


def _precisions(dtype: torch.dtype) -> list[torch.dtype]:
    """The dtype; before a coarser one than float32 that, in which torch accumulates; none for whole numbers."""
    if not dtype.is_floating_point:
        return []
    return [torch.float32, dtype] if _eps(dtype) > _eps(torch.float32) else [dtype]


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _nonzero(row_index: Tensor, column_index: Tensor, values: Tensor) -> Entries:
    magnitude = values.double().abs()
    if not magnitude.isfinite().all():
        raise StructureError("the operator has a NaN or infinite entry")
    keep = magnitude > 0  # sparse matrices may hold zeros
    return row_index[keep], column_index[keep], magnitude[keep]


def _split(matrix: _Matrix, tolerance: float, by_component: bool) -> OperatorSupport:
    """Separate the entries of at most ``tolerance`` times the largest of all, or of their connected component."""
    pieces, counts, maxima, overall = [], [], [], 0.0
    for entries in matrix.entries():
        _, column, magnitude = entries
        largest = magnitude.new_zeros(matrix.columns, dtype=torch.float64).scatter_reduce(0, column, magnitude, "amax")
        overall = max(overall, float(largest.max()))
        # At once, since rounding may fill the matrix: what is small in its column is small in its component. Columns
        # that may be of rounding alone stay whole, since their entries link it with what it is the rounding of.
        is_small = (magnitude <= tolerance * largest[column]) & (largest > tolerance * overall)[column]
        rest, count, maximum = _without(entries, is_small)
        pieces.append(rest)
        counts.append(count)
        maxima.append(maximum)
    row, column, magnitude = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if len(magnitude) == 0:
        raise StructureError(f"a {matrix.rows} x {matrix.columns} operator without a nonzero entry has no structure")
    scale = _largest_of_component(matrix, row, column, magnitude) if by_component and tolerance else magnitude.max()
    is_small = magnitude <= tolerance * scale
    others = int(((magnitude <= _GAP * tolerance * scale) & ~is_small).sum())
    (row, column, magnitude), count, maximum = _without((row, column, magnitude), is_small)
    dropped = sum(counts, count)
    if _GAP * tolerance >= 1:  # a dtype too coarse for a gap: rounding must also fill what would be zero
        others += matrix.rows * matrix.columns - len(magnitude) - dropped
    return OperatorSupport(
        matrix.rows,
        matrix.columns,
        row,
        column,
        dropped,
        max(maximum, *maxima),
        float(magnitude.min()),
        dropped > others,
    )


def _without(entries: Entries, is_small: Tensor) -> tuple[Entries, int, float]:
    """The other entries, the number of the small ones and the largest of them."""
    row, column, magnitude = entries
    small = magnitude[is_small]
    kept = ~is_small
    return (row[kept], column[kept], magnitude[kept]), len(small), float(small.max()) if len(small) else 0.0


def _largest_of_component(matrix: _Matrix, row: Tensor, column: Tensor, magnitude: Tensor) -> Tensor:
    """For each entry the largest magnitude in its connected component."""
    of_row, _ = components(matrix.rows, matrix.columns, row, column)
    largest = magnitude.new_zeros(matrix.rows, dtype=torch.float64).scatter_reduce(0, of_row[row], magnitude, "amax")
    return largest[of_row[row]]
