"""`Mask`: any pattern."""

# No postponed annotations: jsonargparse (LightningCLI) cannot resolve those of a dataclass's own __init__.

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure import mask_encoding
from pibinn_plugin.structure.base import Shape, Structure, constant, matrix_shape, whole_number

_LARGEST = 2**31  # elements: what is read from a file must not allocate without bound


@dataclass(frozen=True, init=False)
class Mask(Structure):
    """Any pattern, kept as the cheapest of a bitmap, sparse rows (CSR-like) and sparse rows of tiles (BSR-like).

    Args:
        pattern: boolean or number, in the shape of the weight; what is not zero is a structural nonzero.

    Raises:
        StructureError: an empty pattern, or one without a nonzero.

    Example:
        >>> structure = Mask([[1, 0], [1, 1]])
        >>> structure.nnz((2, 2)), structure.encoding
        (3, 'bitmap')
    """

    kind: ClassVar[str] = "mask"
    _code: ClassVar[int] = 3

    shape: tuple[int, ...]
    data: bytes

    def __init__(self, pattern: Tensor | Sequence[Any]) -> None:
        # What is kept must serve training and export, whatever mode or default device this is called under.
        with torch.inference_mode(False), torch.device("cpu"):
            flags = torch.as_tensor(pattern).detach().cpu() != 0
            positions = flags.flatten().nonzero().flatten()
            if len(positions) == 0:
                raise StructureError(f"a mask of shape {tuple(flags.shape)} without a nonzero leaves no weight")
            object.__setattr__(self, "shape", tuple(flags.shape))
            object.__setattr__(self, "data", mask_encoding.encode(flags.reshape(matrix_shape(flags.shape))))
            object.__setattr__(self, "_positions", positions)

    @property
    def encoding(self) -> str:
        """``bitmap``, ``csr`` or ``bsr``: the cheapest for this pattern."""
        return mask_encoding.encoding_of(self.data)

    @override
    def check(self, shape: Shape) -> None:
        if tuple(shape) != self.shape:
            raise StructureError(f"a mask of shape {self.shape} does not fit a weight of shape {tuple(shape)}")

    @override
    def positions(self, shape: Shape) -> Tensor:
        return constant(self._positions, "cpu")  # type: ignore[attr-defined]

    @override
    def linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        return F.linear(input, self.to_dense(compact, matrix_shape(shape)))

    @override
    def transposed(self) -> "Mask":
        return Mask(self.mask(self.shape).reshape(matrix_shape(self.shape)).T)

    def _payload(self) -> bytes:
        return struct.pack(f"<B{len(self.shape)}I", len(self.shape), *self.shape) + self.data

    @classmethod
    def _from_payload(cls, payload: bytes) -> "Mask":
        shape = struct.unpack_from(f"<{payload[0]}I", payload, 1)
        return cls._decoded(payload[1 + 4 * len(shape) :], shape)

    def _json_fields(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "data": self.data.hex()}

    @classmethod
    def _from_json_fields(cls, fields: dict[str, Any]) -> "Mask":
        return cls._decoded(bytes.fromhex(fields["data"]), [whole_number(size) for size in fields["shape"]])

    @classmethod
    def _decoded(cls, data: bytes, shape: Shape) -> "Mask":
        if (count := math.prod(shape)) > _LARGEST:
            raise StructureError(f"a mask of {count} elements; expected at most {_LARGEST}")
        with torch.device("cpu"):
            return cls(mask_encoding.decode(data, *matrix_shape(shape)).reshape(tuple(shape)))
