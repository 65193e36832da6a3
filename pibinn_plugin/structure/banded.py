"""`Banded`: the diagonals around the main one."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure.base import Shape, Structure, matrix_shape, refuse_leftover, steps_in_groups, whole_number


@dataclass(frozen=True, repr=False)
class Banded(Structure):
    """The band ``-lower <= column - row <= upper`` of a matrix; the compact form is its diagonals, lowest first.

    Raises:
        StructureError: a negative bandwidth.

    Example:
        >>> Banded(0, 1).mask((3, 3)).int().tolist()
        [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    """

    kind: ClassVar[str] = "banded"
    _code: ClassVar[int] = 2

    lower: int
    upper: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "lower", whole_number(self.lower))
        object.__setattr__(self, "upper", whole_number(self.upper))
        if self.lower < 0 or self.upper < 0:
            raise StructureError(f"bandwidths count diagonals and cannot be negative; got {self}")

    @override
    def _check(self, shape: Shape) -> None:
        rows, columns = matrix_shape(shape)
        if len(shape) != 2 or self.lower >= rows or self.upper >= columns:
            raise StructureError(
                f"{self} does not fit a weight of shape {tuple(shape)}: expected a matrix with lower < rows and "
                f"upper < columns"
            )

    def _diagonals(self, shape: Shape) -> list[tuple[int, int, int]]:
        """``(first row, first column, length)`` of each diagonal in the band."""
        rows, columns = matrix_shape(shape)
        offsets = range(-self.lower, self.upper + 1)
        starts = [(max(0, -offset), max(0, offset)) for offset in offsets]
        return [(row, column, min(rows - row, columns - column)) for row, column in starts]

    @override
    def positions(self, shape: Shape) -> Tensor:
        rows, columns = matrix_shape(shape)
        offset = torch.arange(-self.lower, self.upper + 1, device="cpu")
        row, column = (-offset).clamp(min=0), offset.clamp(min=0)
        diagonal, step = steps_in_groups(torch.minimum(rows - row, columns - column), self.nnz(shape))
        return (row * columns + column)[diagonal] + step * (columns + 1)

    @override
    def compact_shape(self, shape: Shape) -> tuple[int, ...]:
        rows, columns = matrix_shape(shape)
        above = _corner(columns - 1 - self.upper, rows)
        below = _corner(rows - 1 - self.lower, columns)
        return (rows * columns - above - below,)

    @override
    def linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        diagonals = self._diagonals(shape)
        output = input.new_zeros((*input.shape[:-1], shape[0]))
        for (row, column, n), values in zip(diagonals, compact.split([n for _, _, n in diagonals]), strict=True):
            # Padding, not indexed assignment: functional operations trace, export and differentiate.
            output = output + F.pad(values * input[..., column : column + n], (row, shape[0] - row - n))
        return output

    @override
    def transposed(self) -> Banded:
        return Banded(self.upper, self.lower)

    def _payload(self) -> bytes:
        return struct.pack("<II", self.lower, self.upper)

    @classmethod
    def _from_payload(cls, payload: bytes) -> Banded:
        refuse_leftover(payload, 8)
        return cls(*struct.unpack("<II", payload))


def _corner(diagonals: int, longest: int) -> int:
    """The elements of that many diagonals counted from a corner: ``1 + 2 + ...``, none longer than ``longest``."""
    growing = min(diagonals, longest)
    return growing * (growing + 1) // 2 + (diagonals - growing) * longest
