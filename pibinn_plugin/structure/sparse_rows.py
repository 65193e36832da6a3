"""Where the bits of a pattern belong, row by row: an index for the native kernel, derived and never stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pibinn_plugin.structure.base import Shape, Structure, matrix_shape

_LARGEST = 2**31 - 1  # of what the index counts


def sparse_rows(structure: Structure, shape: Shape) -> Tensor | None:
    """The index of the structural nonzeros of a weight, seen as a matrix; made once and kept with the structure.

    Args:
        structure: where the structural nonzeros are.
        shape: the dense shape of the weight.

    Returns:
        int32, on the CPU: the number of nonzeros in the rows before each row, and in all; the column of each nonzero,
        row by row; and, unless the compact order is row by row, too, the place of each in that order. None where 32
        bits are too few, and in a graph that is compiled before the index was made: it would be made in each run.

    Example:
        >>> from pibinn_plugin.structure import Banded, Mask
        >>> sparse_rows(Mask([[0, 1, 1], [1, 0, 0]]), (2, 3))
        tensor([0, 2, 3, 1, 2, 0], dtype=torch.int32)
        >>> sparse_rows(Banded(0, 1), (2, 2))
        tensor([0, 2, 3, 0, 1, 1, 0, 2, 1], dtype=torch.int32)
    """
    matrix = matrix_shape(shape)
    kept: dict[tuple[int, int], Tensor] = getattr(structure, "_sparse_rows", {})
    if matrix in kept:
        return kept[matrix]
    if torch.compiler.is_compiling() or max(structure.nnz(shape), *matrix) > _LARGEST:
        return None
    # What is kept serves training too, and is of real tensors under whatever mode it is made.
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        kept = {**kept, matrix: _index(structure.positions(shape), *matrix)}
    object.__setattr__(structure, "_sparse_rows", kept)
    return kept[matrix]


def _index(positions: Tensor, rows: int, columns: int) -> Tensor:
    by_row, order = positions.sort()
    starts = torch.searchsorted(by_row, torch.arange(rows + 1, device="cpu") * columns)
    parts = [starts, by_row % columns] if torch.equal(by_row, positions) else [starts, by_row % columns, order]
    return torch.cat(parts).to(torch.int32)
