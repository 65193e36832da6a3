"""`Mask`: any pattern."""

# No postponed annotations: jsonargparse (LightningCLI) cannot resolve those of a dataclass's own __init__.

import math
import struct
import warnings
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import override

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure import mask_encoding
from pibinn_plugin.structure.base import Shape, Structure, check_shape, constant, matrix_shape, short, whole_numbers

_MOST_ELEMENTS = 2**31


@dataclass(frozen=True, init=False, repr=False)
class Mask(Structure):
    """Any pattern, kept as the cheapest of a bitmap, sparse rows (CSR-like) and sparse rows of tiles (BSR-like).

    A mask that is read from bytes takes time and memory in proportion to the bytes, and so does its number of
    nonzeros, `nnz`: the nonzeros themselves are made when `positions` is first asked for.

    Args:
        pattern: boolean or number, in the shape of the weight; what is not zero is a structural nonzero.

    Warns:
        UserWarning: floating-point numbers some of which, beside the largest, are rounding.

    Raises:
        StructureError: a pattern that is no array of real and finite numbers, that is empty, without a nonzero or of
            more than 2³¹ elements.

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
            try:
                values = torch.as_tensor(pattern).detach().cpu()
            except (TypeError, ValueError, RuntimeError) as error:
                raise StructureError(f"a mask is an array of numbers; got {short(pattern)}: {short(error)}") from error
            values = values.to_dense() if values.layout != torch.strided else values
            if values.is_complex() or not values.isfinite().all():
                raise StructureError(
                    f"a mask of shape {tuple(values.shape)} holds a NaN, an infinite or a complex number; expected "
                    f"True or 1 where a weight may be nonzero, False or 0 elsewhere"
                )
            _warn_of_rounding(values)
            self._encode(values.flatten().nonzero().flatten(), tuple(values.shape))

    @classmethod
    def from_positions(cls, positions: Tensor, shape: Shape) -> "Mask":
        """The mask of a weight of this shape whose structural nonzeros are at these flat indices.

        Args:
            positions: int64, each index once, ascending.
            shape: the dense shape of the weight.

        Raises:
            StructureError: no positions, or a shape of more than 2³¹ elements.

        Example:
            >>> Mask.from_positions(torch.tensor([0, 3]), (2, 2)) == Mask([[1, 0], [0, 1]])
            True
        """
        mask = cls.__new__(cls)
        with torch.inference_mode(False), torch.device("cpu"):
            mask._encode(positions, tuple(shape))
        return mask

    def _encode(self, positions: Tensor, shape: tuple[int, ...]) -> None:
        if len(positions) == 0:
            raise StructureError(f"a mask of shape {shape} without a nonzero leaves no weight")
        _check_elements(shape)
        self._keep(shape, mask_encoding.encode(positions, *matrix_shape(shape)), len(positions))

    def _keep(self, shape: tuple[int, ...], data: bytes, nnz: int) -> None:
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "_nnz", nnz)

    @property
    def encoding(self) -> str:
        """``bitmap``, ``csr`` or ``bsr``: the cheapest for this pattern."""
        return mask_encoding.encoding_of(self.data)

    @override
    def _check(self, shape: Shape) -> None:
        if tuple(shape) != self.shape:
            raise StructureError(f"a mask of shape {self.shape} does not fit a weight of shape {tuple(shape)}")

    @override
    def compact_shape(self, shape: Shape) -> tuple[int, ...]:
        return (self._nnz,)  # type: ignore[attr-defined]

    @override
    def positions(self, shape: Shape) -> Tensor:
        is_compiling = torch.compiler.is_compiling()
        return constant(_positions_of(self.data, self.shape) if is_compiling else self._positions, "cpu")

    @cached_property
    def _positions(self) -> Tensor:
        return _positions_of(self.data, self.shape)

    @override
    def _linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        return F.linear(input, self.to_dense(compact, matrix_shape(shape)))

    @override
    def transposed(self) -> "Mask":
        rows, columns = matrix_shape(self.shape)
        positions = self.positions(self.shape)
        return Mask.from_positions((positions % columns * rows + positions // columns).sort().values, (columns, rows))

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
        if fields.keys() != {"shape", "data"}:
            raise TypeError(f"the fields of a mask are shape and data, not {sorted(fields)}")
        return cls._decoded(bytes.fromhex(fields["data"]), whole_numbers(fields["shape"]))

    @classmethod
    def _decoded(cls, data: bytes, shape: tuple[int, ...]) -> "Mask":
        _check_elements(shape)
        nnz = mask_encoding.decode(data, *matrix_shape(shape)).nnz
        if nnz == 0:
            raise StructureError(f"a mask of shape {shape} without a nonzero leaves no weight")
        mask = cls.__new__(cls)
        mask._keep(shape, data, nnz)
        return mask


def _warn_of_rounding(values: Tensor) -> None:
    """A matrix that an FFT has made, say, is nonzero everywhere."""
    if not values.is_floating_point() or not values.numel():
        return
    magnitude = values.abs()
    limit = float(magnitude.max()) * 8 * min(torch.finfo(values.dtype).eps, torch.finfo(torch.float32).eps)
    if count := int(((magnitude > 0) & (magnitude <= limit)).sum()):
        warnings.warn(
            f"{count} of the nonzeros of a mask are no larger than rounding, up to {limit:.3g}, and weights will stand "
            f"for them; structure_from_operator(matrix) gives the structure without them",
            stacklevel=3,
        )


# Of all masks and graphs that there are, once each.
_known_positions: MutableMapping[tuple[bytes, tuple[int, ...]], Tensor] = WeakValueDictionary()


def _positions_of(data: bytes, shape: tuple[int, ...]) -> Tensor:
    positions = _known_positions.get((data, shape))
    if positions is None:
        # The first use may be under export (a fake tensor) or in inference mode (no gradients).
        with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
            positions = mask_encoding.decode(data, *matrix_shape(shape)).positions()
        _known_positions[data, shape] = positions
    return positions


# Traced code takes the result as it is: the positions are made outside of the graph, once. This is all that
# torch.compiler.assume_constant_result does, apart from importing the compiler, which takes seconds. Its arguments are
# to be plain constants: not every compiler knows a mask for one.
_positions_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_elements(shape: tuple[int, ...]) -> None:
    check_shape(shape)
    if (count := math.prod(shape)) > _MOST_ELEMENTS:
        raise StructureError(f"a mask of shape {shape} has {count} elements; expected at most 2^31")
