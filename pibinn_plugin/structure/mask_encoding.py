"""A boolean matrix in the fewest bytes: a bitmap, or the sparse rows of its elements or of its constant tiles.

Sparse rows are the classical pair of row pointers and column indices, each in the narrowest unsigned integer that
holds its largest value. A tile is the largest ``height x width`` that divides the matrix and in which every tile is
all True or all False; tiles of one element are CSR, larger ones BSR.

Encoding and decoding take time and memory in proportion to the nonzeros and to the bytes, never to the elements of
the matrix: a few bytes may describe one tile of a billion elements.
"""

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from pibinn_plugin.bits import pack_bits, unpack_bits
from pibinn_plugin.structure.base import steps_in_groups

_BITMAP, _SPARSE_ROWS = 0, 1
_HEADER = "<BII"  # encoding, tile height, tile width
_HEADER_SIZE = struct.calcsize(_HEADER)
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


@dataclass(frozen=True, eq=False)
class TileRows:
    """The tiles of a boolean matrix that are True, row by row.

    Args:
        columns: of the matrix, in elements.
        height: of a tile.
        width: of a tile.
        counts: int64, the number of True tiles in each row of tiles.
        tile_columns: int64, the column of each True tile, in tiles, row by row and ascending in each row.
    """

    columns: int
    height: int
    width: int
    counts: Tensor
    tile_columns: Tensor

    @property
    def nnz(self) -> int:
        """The number of True elements."""
        return len(self.tile_columns) * self.height * self.width

    def positions(self) -> Tensor:
        """int64, shape ``(nnz,)``: the flat index of each True element, ascending."""
        # A line is one row of elements of one tile. Those of a row of tiles come row by row of elements.
        tile_row, step = steps_in_groups(self.counts * self.height, len(self.tile_columns) * self.height)
        count = self.counts[tile_row]
        tile = (self.counts.cumsum(0) - self.counts)[tile_row] + step % count
        first = (tile_row * self.height + step // count) * self.columns + self.tile_columns[tile] * self.width
        return (first[:, None] + torch.arange(self.width, device="cpu")).flatten()


def encode(positions: Tensor, rows: int, columns: int) -> bytes:
    """The cheapest encoding of a boolean matrix.

    Args:
        positions: int64, the flat index of each True element, ascending; at least one.
        rows: of the matrix.
        columns: of the matrix.

    Example:
        >>> blocks = torch.block_diag(*[torch.ones(16, 16)] * 32)
        >>> encoding_of(encode(blocks.flatten().nonzero().flatten(), 512, 512))
        'bsr'
    """
    row, column = positions // columns, positions % columns
    by_column = column.argsort(stable=True)
    height, width = _repeats(row, column, rows), _repeats(column[by_column], row[by_column], columns)
    sizes = {
        (_BITMAP, 1, 1): -(-rows * columns // 8),
        (_SPARSE_ROWS, 1, 1): _size_of_sparse_rows(len(positions), rows, columns),
    }
    tiles = len(positions) // (height * width)
    sizes.setdefault((_SPARSE_ROWS, height, width), _size_of_sparse_rows(tiles, rows // height, columns // width))
    encoding, height, width = min(sizes, key=lambda choice: sizes[choice])
    header = struct.pack(_HEADER, encoding, height, width)
    if encoding == _BITMAP:
        flags = torch.zeros(rows * columns, dtype=torch.bool).index_fill(0, positions, True)
        return header + _tensor_to_bytes(pack_bits(flags), 1)
    is_first = (row % height == 0) & (column % width == 0)
    return header + _sparse_rows(row[is_first] // height, column[is_first] // width, rows // height, columns // width)


def encoding_of(data: bytes) -> str:
    """``bitmap``, ``csr`` or ``bsr``."""
    encoding, height, width = struct.unpack_from(_HEADER, data)
    if encoding == _BITMAP:
        return "bitmap"
    return "csr" if height * width == 1 else "bsr"


def tile_of(data: bytes) -> tuple[int, int]:
    """Height and width of the tiles of sparse rows; ``(1, 1)`` for CSR and bitmaps."""
    _, height, width = struct.unpack_from(_HEADER, data)
    return height, width


def decode(data: bytes, rows: int, columns: int) -> TileRows:
    """Invert `encode`, as far as the bytes go: no element is made.

    Raises:
        ValueError: the bytes are not the encoding of a matrix of this size.
    """
    encoding, height, width = struct.unpack_from(_HEADER, data)
    body = data[_HEADER_SIZE:]
    if encoding == _BITMAP and height == width == 1:
        return _decode_bitmap(body, rows, columns)
    if encoding != _SPARSE_ROWS or height < 1 or width < 1 or rows % height or columns % width:
        raise ValueError(f"encoding {encoding} with tiles of {height} x {width} in a {rows} x {columns} matrix")
    counts, tile_columns = _decode_sparse_rows(body, rows // height, columns // width)
    return TileRows(columns, height, width, counts, tile_columns)


def _decode_bitmap(body: bytes, rows: int, columns: int) -> TileRows:
    if len(body) != (expected := -(-rows * columns // 8)):
        raise ValueError(f"{len(body)} bytes where {expected} were expected")
    flags = unpack_bits(_bytes_to_tensor(body, 1).to(torch.uint8), 8 * len(body))
    if flags[rows * columns :].any():
        raise ValueError("a bit is set behind the last element")
    flags = flags[: rows * columns].reshape(rows, columns)
    return TileRows(columns, 1, 1, flags.sum(1), flags.flatten().nonzero().flatten() % columns)


def _sparse_rows(row: Tensor, column: Tensor, rows: int, columns: int) -> bytes:
    counts = torch.bincount(row, minlength=rows)
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return _tensor_to_bytes(pointers, _pointer_width(rows * columns)) + _tensor_to_bytes(column, _width(columns))


def _size_of_sparse_rows(nnz: int, rows: int, columns: int) -> int:
    return (rows + 1) * _pointer_width(rows * columns) + nnz * _width(columns)


def _decode_sparse_rows(body: bytes, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The number of nonzeros of each row, and their columns."""
    pointer_bytes = _pointer_width(rows * columns) * (rows + 1)
    pointers = _bytes_to_tensor(body[:pointer_bytes], _pointer_width(rows * columns))
    indices = _bytes_to_tensor(body[pointer_bytes:], _width(columns))
    counts = pointers.diff()
    if len(pointers) != rows + 1 or pointers[0] != 0 or pointers[-1] != len(indices) or (counts < 0).any():
        raise ValueError(f"row pointers do not describe {rows} rows of {len(indices)} indices")
    if (indices >= columns).any():
        raise ValueError(f"a column index beyond {columns} columns")
    row_of_index = torch.arange(rows, device="cpu").repeat_interleave(counts)
    if ((row_of_index * columns + indices).diff() <= 0).any():
        raise ValueError("the column indices of a row do not ascend")
    return counts, indices


def _repeats(line: Tensor, place: Tensor, lines: int) -> int:
    """The largest divisor of the number of lines such that all lines of a group of that many are the same.

    Args:
        line: the line of each nonzero, ascending.
        place: its place in the line, ascending in each.
        lines: how many there are.
    """
    counts = torch.bincount(line, minlength=lines)
    differs = counts.diff() != 0  # line i + 1 from line i
    # Where two lines have as many nonzeros, the counterpart of each stands as many before it.
    counterpart = torch.arange(len(line)) - counts[line]
    is_other = (counterpart >= 0) & (place != place[counterpart])
    changed = line[is_other]
    differs[changed[changed > 0] - 1] = True
    return math.gcd(lines, *(differs.nonzero().flatten() + 1).tolist())


def _pointer_width(largest: int) -> int:
    return _width(largest + 1)


def _width(count: int) -> int:
    """Bytes of the narrowest unsigned integer that holds ``count - 1``."""
    return next(width for width in _UNSIGNED if count <= 1 << (8 * width))  # a mask has at most 2^31 elements


def _tensor_to_bytes(values: Tensor, width: int) -> bytes:
    shifts = 8 * torch.arange(width)
    return bytes(((values.long()[:, None] >> shifts) & 255).to(torch.uint8).flatten().tolist())


def _bytes_to_tensor(data: bytes, width: int) -> Tensor:
    if len(data) % width:
        raise ValueError(f"{len(data)} bytes are no multiple of {width}")
    if not data:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=_UNSIGNED[width]).long()
