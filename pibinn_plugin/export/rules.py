"""The masks of structures as modules that compute them: small constants in, a boolean for each element out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.bits import pack_bits, unpack_bits
from pibinn_plugin.structure import Banded, BlockDiagonal, Mask, Shape, Structure, mask_encoding, matrix_shape


def rule_of(structure: Structure, shape: Shape) -> nn.Module:
    """A module without arguments that returns the mask of a weight of this shape: boolean, flat, row-major.

    Example:
        >>> rule_of(Banded(0, 1), (3, 3))().int().tolist()
        [1, 1, 0, 0, 1, 1, 0, 0, 1]
    """
    rows, columns = matrix_shape(shape)
    if isinstance(structure, Banded):
        return _BandRule(rows, columns, structure)
    if isinstance(structure, BlockDiagonal):
        return _BlockRule(rows, columns, structure)
    mask = structure if isinstance(structure, Mask) else Mask(structure.mask(shape))
    if mask.encoding == "bitmap":
        return BitmapRule(mask.mask(shape).flatten())
    return _SparseRowsRule(mask, rows, columns)


def narrow(values: Tensor) -> Tensor:
    """Nonnegative integers in the smallest dtype that holds them and that every exporter knows."""
    largest = int(values.max()) if values.numel() else 0
    dtypes = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return values.to(next(dtype for dtype in dtypes if largest <= torch.iinfo(dtype).max))


class _BandRule(nn.Module):
    """A band: the column minus the row lies between two numbers."""

    def __init__(self, rows: int, columns: int, structure: Banded) -> None:
        super().__init__()
        self.rows, self.columns, self.structure = rows, columns, structure

    @override
    def forward(self) -> Tensor:
        offset = torch.arange(self.columns) - torch.arange(self.rows)[:, None]
        return ((offset >= -self.structure.lower) & (offset <= self.structure.upper)).flatten()


class _BlockRule(nn.Module):
    """Blocks: the row and the column carry the same block number."""

    def __init__(self, rows: int, columns: int, structure: BlockDiagonal) -> None:
        super().__init__()
        block_rows, block_columns = structure.sizes((rows, columns))
        self.row_number = _BlockNumbers(rows, block_rows, structure.row_order)
        self.column_number = _BlockNumbers(columns, block_columns, structure.column_order)

    @override
    def forward(self) -> Tensor:
        return (self.row_number()[:, None] == self.column_number()).flatten()


class _BlockNumbers(nn.Module):
    """The block of each row (or column): stored where they are permuted, else counted from the sizes of the blocks."""

    stored: Tensor

    def __init__(self, count: int, sizes: Sequence[int], order: Sequence[int] | None) -> None:
        super().__init__()
        self.count, self.blocks = count, len(sizes)
        self.is_permuted = order is not None
        self.equal_size = sizes[0] if len(set(sizes)) == 1 and order is None else None
        if order is not None:
            numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            self.register_buffer("stored", narrow(torch.empty_like(numbers).scatter(0, torch.tensor(order), numbers)))
        elif self.equal_size is None:
            self.register_buffer("stored", narrow(torch.tensor(sizes).cumsum(0)[:-1]))

    @override
    def forward(self) -> Tensor:
        if self.is_permuted:
            return self.stored.to(torch.int64)
        if self.equal_size is not None:
            ends = torch.arange(1, self.blocks) * self.equal_size
        else:
            ends = self.stored.to(torch.int64)
        return (torch.arange(self.count)[:, None] >= ends).to(torch.int64).sum(1)


class BitmapRule(nn.Module):
    """One bit for each element of a flat mask."""

    bitmap: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.count = len(mask)
        self.register_buffer("bitmap", pack_bits(mask))

    @override
    def forward(self) -> Tensor:
        return unpack_bits(self.bitmap, self.count)


class _SparseRowsRule(nn.Module):
    """The tiles that are all True, row by row: where each row but the first starts, and the column of each tile."""

    row_starts: Tensor
    columns: Tensor

    def __init__(self, mask: Mask, rows: int, columns: int) -> None:
        super().__init__()
        self.height, self.width = height, width = mask_encoding.tile_of(mask.data)
        self.tile_rows, self.tile_columns = rows // height, columns // width
        tiles = mask.mask(mask.shape).reshape(rows, columns)[::height, ::width]
        self.register_buffer("row_starts", narrow(tiles.sum(1).cumsum(0)[:-1]))
        self.register_buffer("columns", narrow(tiles.nonzero()[:, 1]))

    @override
    def forward(self) -> Tensor:
        starts, columns = self.row_starts.to(torch.int64), self.columns.to(torch.int64)
        # How many rows start at an entry; summed up, the row of each entry. Trailing empty rows start past the end.
        rows_starting = torch.zeros(len(columns) + 1, dtype=torch.int64).scatter_add(0, starts, torch.ones_like(starts))
        places = rows_starting.cumsum(0)[:-1] * self.tile_columns + columns
        count = self.tile_rows * self.tile_columns
        tiles = torch.zeros(count, dtype=torch.int64).scatter_add(0, places, torch.ones_like(places)) != 0
        tiles = tiles.reshape(self.tile_rows, 1, self.tile_columns, 1)
        return tiles.expand(self.tile_rows, self.height, self.tile_columns, self.width).flatten()
