"""`BlockDiagonal`: equal or uneven blocks along the diagonal, up to a permutation."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure.base import (
    Shape,
    Structure,
    constant,
    matrix_shape,
    refuse_leftover,
    short,
    steps_in_groups,
    whole_number,
    whole_numbers,
)


@dataclass(frozen=True, repr=False)
class BlockDiagonal(Structure):
    """Blocks along the diagonal: equal ones from their number, uneven ones from their rows and columns.

    With ``row_order`` and ``column_order`` the matrix is block-diagonal up to a permutation:
    ``W[row_order[i], column_order[j]] = B[i, j]`` for the block-diagonal ``B``.

    Args:
        blocks: the number of equal blocks; may be left out when ``rows`` and ``columns`` are given.
        rows: the number of rows of each block.
        columns: the number of columns of each block.
        row_order: a permutation of all rows.
        column_order: a permutation of all columns.

    Raises:
        StructureError: no or negative blocks, rows without columns, a block that has neither, an order that is no
            permutation.

    Example:
        >>> BlockDiagonal(2).mask((2, 4)).int().tolist()
        [[1, 1, 0, 0], [0, 0, 1, 1]]
        >>> BlockDiagonal(rows=(1, 2), columns=(2, 1)).mask((3, 3)).int().tolist()
        [[1, 1, 0], [0, 0, 1], [0, 0, 1]]
    """

    kind: ClassVar[str] = "block_diagonal"
    _code: ClassVar[int] = 1

    blocks: int | None = None
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None
    row_order: tuple[int, ...] | None = None
    column_order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None:
            object.__setattr__(self, "blocks", whole_number(self.blocks))
        for name in ("rows", "columns", "row_order", "column_order"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_numbers(value))
        if (self.rows is None) != (self.columns is None) or (self.row_order is None) != (self.column_order is None):
            raise StructureError(f"give rows and columns, and row_order and column_order, together; got {self}")
        if self.rows is not None and self.columns is not None:
            self._take_uneven_blocks(self.rows, self.columns)
        if self.blocks is None or self.blocks < 1:
            raise StructureError(f"expected at least one block, or the rows and columns of each; got {self}")
        for order in (self.row_order, self.column_order):
            if order is not None and sorted(order) != list(range(len(order))):
                raise StructureError(f"an order must hold each of 0..{len(order) - 1} once; got {short(order)}")
        self._keep_indices()

    def _take_uneven_blocks(self, rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
        if len(rows) != len(columns) or min((*rows, *columns), default=-1) < 0:
            raise StructureError(
                f"expected as many rows as columns, none negative; got rows={short(rows)}, columns={short(columns)}"
            )
        if (0, 0) in zip(rows, columns, strict=True):  # a file could hold any number of them, for any matrix
            raise StructureError(
                f"a block has neither rows nor columns; leave it out of rows={short(rows)}, columns={short(columns)}"
            )
        if sum(r * c for r, c in zip(rows, columns, strict=True)) == 0:
            raise StructureError(f"blocks of rows={short(rows)} and columns={short(columns)} leave no weight")
        if self.blocks not in (None, len(rows)):
            raise StructureError(f"blocks={self.blocks}, but rows and columns describe {len(rows)} blocks")
        object.__setattr__(self, "blocks", len(rows))
        if len(set(rows)) == len(set(columns)) == 1:  # one way to say one thing: equal blocks are equal
            object.__setattr__(self, "rows", None)
            object.__setattr__(self, "columns", None)

    def _keep_indices(self) -> None:
        # Here and not at first use, which may be under export (a fake tensor) or in inference mode (no gradients).
        if self.row_order is not None and self.column_order is not None:
            with torch.inference_mode(False):
                object.__setattr__(self, "_column_index", torch.tensor(self.column_order, device="cpu"))
                object.__setattr__(self, "_row_index", torch.tensor(self.row_order, device="cpu").argsort())

    @property
    def _count(self) -> int:
        assert self.blocks is not None  # set in __post_init__
        return self.blocks

    def sizes(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows and the columns of each block of a weight of this shape."""
        if self.rows is not None and self.columns is not None:
            return self.rows, self.columns
        rows, columns = matrix_shape(shape)
        return (rows // self._count,) * self._count, (columns // self._count,) * self._count

    @override
    def _check(self, shape: Shape) -> None:
        rows, columns = matrix_shape(shape)
        if self.rows is not None and self.columns is not None:
            if (sum(self.rows), sum(self.columns)) != (rows, columns):
                raise StructureError(
                    f"blocks of {sum(self.rows)} rows and {sum(self.columns)} columns in all do not fit a weight of "
                    f"shape {tuple(shape)}, a {rows} x {columns} matrix"
                )
        elif len(shape) < 2 or shape[0] % self._count or shape[1] % self._count:
            both = math.gcd(*shape[:2])
            raise StructureError(
                f"{self.blocks} equal blocks do not fit a weight of shape {tuple(shape)}: what fits is a divisor of "
                f"{both}, or rows=(...) and columns=(...) for uneven blocks"
            )
        for order, size in ((self.row_order, rows), (self.column_order, columns)):
            if order is not None and len(order) != size:
                raise StructureError(f"an order of {len(order)} does not fit {size} in a weight of {tuple(shape)}")

    @override
    def positions(self, shape: Shape) -> Tensor:
        rows, columns = matrix_shape(shape)
        row_of, column_of = (
            torch.arange(size, device="cpu") if order is None else torch.tensor(order, device="cpu")
            for order, size in ((self.row_order, rows), (self.column_order, columns))
        )
        heights, widths = (torch.tensor(sizes, device="cpu") for sizes in self.sizes(shape))
        block_of_row, _ = steps_in_groups(heights, rows)
        row, step = steps_in_groups(widths[block_of_row], self.nnz(shape))
        column = (widths.cumsum(0) - widths)[block_of_row][row] + step
        return row_of[row] * columns + column_of[column]

    @override
    def compact_shape(self, shape: Shape) -> tuple[int, ...]:
        if self.rows is None or self.columns is None:
            rows, columns = matrix_shape(shape)
            return self._count, rows // self._count, columns // self._count
        return (sum(r * c for r, c in zip(self.rows, self.columns, strict=True)),)

    @override
    def _linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        if self.column_order is not None:
            input = input.index_select(-1, constant(self._column_index, input.device))  # type: ignore[attr-defined]
        output = self._ordered_linear(input, compact, shape)
        if self.row_order is not None:
            output = output.index_select(-1, constant(self._row_index, input.device))  # type: ignore[attr-defined]
        return output

    def _ordered_linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        if self.rows is None:
            count, rows, columns = self.compact_shape(shape)
            return multiply_blocks(input, compact.reshape(count, rows, columns))
        block_rows, block_columns = self.sizes(shape)
        flat_blocks = compact.split([r * c for r, c in zip(block_rows, block_columns, strict=True)])
        parts = zip(input.split(list(block_columns), -1), flat_blocks, block_rows, block_columns, strict=True)
        return torch.cat([F.linear(part, block.reshape(r, c)) for part, block, r, c in parts], -1)

    @override
    def transposed(self) -> BlockDiagonal:
        if self.rows is None:
            return BlockDiagonal(self.blocks, row_order=self.column_order, column_order=self.row_order)
        return BlockDiagonal(
            rows=self.columns, columns=self.rows, row_order=self.column_order, column_order=self.row_order
        )

    def _payload(self) -> bytes:
        flags = (self.rows is not None) | (self.row_order is not None) << 1
        lists = [item for item in (self.rows, self.columns, self.row_order, self.column_order) if item is not None]
        data = b"".join(struct.pack(f"<I{len(item)}I", len(item), *item) for item in lists)
        return struct.pack("<BI", flags, self._count) + data

    @classmethod
    def _from_payload(cls, payload: bytes) -> BlockDiagonal:
        flags, blocks = struct.unpack_from("<BI", payload)
        offset, lists = 5, []
        for _ in range(2 * (flags & 1) + (flags & 2)):
            (count,) = struct.unpack_from("<I", payload, offset)
            lists.append(struct.unpack_from(f"<{count}I", payload, offset + 4))
            offset += 4 + 4 * count
        refuse_leftover(payload, offset)
        rows, columns = (lists[0], lists[1]) if flags & 1 else (None, None)
        row_order, column_order = (lists[-2], lists[-1]) if flags & 2 else (None, None)
        return cls(blocks, rows, columns, row_order, column_order)


def multiply_blocks(input: Tensor, blocks: Tensor) -> Tensor:
    """The product of a matrix of equal blocks along the diagonal with each vector of a batch.

    One batched matrix product, which every exporter and compiler knows; an einsum with an ellipsis few of them do.

    Args:
        input: shape ``(..., count * columns)``.
        blocks: shape ``(count, rows, columns)``.

    Returns:
        Shape ``(..., count * rows)``.

    Example:
        >>> multiply_blocks(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]]))
        tensor([ 3., -1.])
    """
    count, rows, columns = blocks.shape
    vectors = input if input.dim() == 2 else input.reshape(-1, count * columns)
    parts = vectors.unflatten(-1, (count, columns)).transpose(0, 1)
    product = torch.matmul(parts, blocks.transpose(1, 2)).transpose(0, 1).flatten(1)
    return product if input.dim() == 2 else product.reshape(*input.shape[:-1], count * rows)
