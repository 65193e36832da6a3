"""A boolean matrix in the fewest bytes: a bitmap, or the sparse rows of its elements or of its constant tiles.

Sparse rows are the classical pair of row pointers and column indices, each in the narrowest unsigned integer that
holds its largest value. A tile is the largest ``height x width`` that divides the matrix and in which every tile is
all True or all False; tiles of one element are CSR, larger ones BSR.
"""

import math
import struct

import torch
from torch import Tensor

from pibinn_plugin.bits import pack_bits, unpack_bits

_BITMAP, _SPARSE_ROWS = 0, 1
_HEADER = "<BII"  # encoding, tile height, tile width
_HEADER_SIZE = struct.calcsize(_HEADER)


def encode(flags: Tensor) -> bytes:
    """The cheapest encoding of a boolean matrix.

    Example:
        >>> encoding_of(encode(torch.block_diag(*[torch.ones(16, 16)] * 32) != 0))
        'bsr'
    """
    candidates = [_encode_bitmap(flags), _encode_sparse_rows(flags, 1, 1)]
    height, width = _tile(flags), _tile(flags.T)
    if height * width > 1:
        candidates.append(_encode_sparse_rows(flags, height, width))
    return min(candidates, key=len)


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


def decode(data: bytes, rows: int, columns: int) -> Tensor:
    """Invert `encode`: boolean, shape ``(rows, columns)``.

    Raises:
        ValueError: the bytes are not the encoding of a matrix of this size.
    """
    encoding, height, width = struct.unpack_from(_HEADER, data)
    body = data[_HEADER_SIZE:]
    if encoding == _BITMAP:
        _check_size(body, -(-rows * columns // 8))
        return unpack_bits(_bytes_to_tensor(body, 1).to(torch.uint8), rows * columns).reshape(rows, columns)
    if encoding != _SPARSE_ROWS or height < 1 or width < 1 or rows % height or columns % width:
        raise ValueError(f"encoding {encoding} with tiles of {height} x {width} in a {rows} x {columns} matrix")
    tiles = _decode_sparse_rows(body, rows // height, columns // width)
    return tiles.repeat_interleave(height, 0).repeat_interleave(width, 1)


def _encode_bitmap(flags: Tensor) -> bytes:
    return struct.pack(_HEADER, _BITMAP, 1, 1) + _tensor_to_bytes(pack_bits(flags.flatten()), 1)


def _encode_sparse_rows(flags: Tensor, height: int, width: int) -> bytes:
    tiles = flags[::height, ::width]
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), tiles.sum(1).cumsum(0)])
    indices = tiles.nonzero()[:, 1]
    body = _tensor_to_bytes(pointers, _pointer_width(tiles.numel()))
    return struct.pack(_HEADER, _SPARSE_ROWS, height, width) + body + _tensor_to_bytes(indices, _width(tiles.shape[1]))


def _decode_sparse_rows(body: bytes, rows: int, columns: int) -> Tensor:
    pointer_bytes = _pointer_width(rows * columns) * (rows + 1)
    pointers = _bytes_to_tensor(body[:pointer_bytes], _pointer_width(rows * columns))
    indices = _bytes_to_tensor(body[pointer_bytes:], _width(columns))
    if len(pointers) != rows + 1 or pointers[0] != 0 or pointers[-1] != len(indices) or (pointers.diff() < 0).any():
        raise ValueError(f"row pointers do not describe {rows} rows of {len(indices)} indices")
    if (indices >= columns).any():
        raise ValueError(f"a column index beyond {columns} columns")
    tiles = torch.zeros(rows, columns, dtype=torch.bool)
    tiles[torch.arange(rows).repeat_interleave(pointers.diff()), indices] = True
    return tiles


def _tile(flags: Tensor) -> int:
    """The largest divisor of the number of rows such that all rows of a group of that many are the same."""
    rows = flags.shape[0]
    starts = (flags[1:] != flags[:-1]).any(1).nonzero().flatten() + 1  # where a row differs from the one before
    return math.gcd(rows, *starts.tolist())


def _pointer_width(largest: int) -> int:
    return _width(largest + 1)


def _width(count: int) -> int:
    """Bytes of the narrowest unsigned integer that holds ``count - 1``."""
    return next(width for width in (1, 2, 4, 8) if count <= 1 << (8 * width))


def _tensor_to_bytes(values: Tensor, width: int) -> bytes:
    shifts = 8 * torch.arange(width)
    return bytes(((values.long()[:, None] >> shifts) & 255).to(torch.uint8).flatten().tolist())


def _bytes_to_tensor(data: bytes, width: int) -> Tensor:
    if len(data) % width:
        raise ValueError(f"{len(data)} bytes are no multiple of {width}")
    if not data:
        return torch.zeros(0, dtype=torch.int64)
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return (octets.reshape(-1, width).long() << (8 * torch.arange(width))).sum(1)


def _check_size(body: bytes, expected: int) -> None:
    if len(body) != expected:
        raise ValueError(f"{len(body)} bytes where {expected} were expected")
