"""`Dense`: every weight may be nonzero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pibinn_plugin.structure.base import Shape, Structure, matrix_shape, refuse_leftover


@dataclass(frozen=True, repr=False)
class Dense(Structure):
    """Every weight is a structural nonzero.

    Example:
        >>> Dense().nnz((3, 4)), Dense().metadata_bits
        (12, 8)
    """

    kind: ClassVar[str] = "dense"
    _code: ClassVar[int] = 0

    @override
    def _check(self, shape: Shape) -> None:
        pass

    @override
    def positions(self, shape: Shape) -> Tensor:
        return torch.arange(math.prod(shape), device="cpu")

    @override
    def compact_shape(self, shape: Shape) -> tuple[int, ...]:
        return tuple(shape)

    @override
    def to_compact(self, dense: Tensor) -> Tensor:
        self.check(dense.shape)
        return dense

    @override
    def to_dense(self, compact: Tensor, shape: Shape) -> Tensor:
        return compact.reshape(tuple(shape))

    @override
    def _linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        return F.linear(input, compact.reshape(matrix_shape(shape)))

    @override
    def transposed(self) -> Dense:
        return self

    def _payload(self) -> bytes:
        return b""

    @classmethod
    def _from_payload(cls, payload: bytes) -> Dense:
        refuse_leftover(payload, 0)
        return cls()
