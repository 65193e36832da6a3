"""The base class of the structures: what a pattern of structural nonzeros can do."""

from __future__ import annotations

import json
import math
import operator
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from pibinn_plugin.errors import StructureError

Shape = Sequence[int]


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """The matrix that a weight of this shape is seen as: ``(shape[0], prod(shape[1:]))``, one row for a vector.

    Example:
        >>> matrix_shape((16, 4, 3, 3))
        (16, 36)
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    return int(shape[0]), math.prod(shape[1:])


class Structure(ABC):
    """A fixed pattern of structural nonzeros. Subclasses are frozen dataclasses."""

    kind: ClassVar[str]
    _code: ClassVar[int]
    _kinds: ClassVar[dict[str | int, type[Structure]]] = {}

    def __init_subclass__(cls) -> None:
        Structure._kinds[cls.kind] = Structure._kinds[cls._code] = cls

    @abstractmethod
    def check(self, shape: Shape) -> None:
        """Raise `StructureError` if a weight of this shape cannot have this structure."""

    @abstractmethod
    def positions(self, shape: Shape) -> Tensor:
        """int64, shape ``(nnz,)``: the flat index in the dense weight of each compact element, in compact order."""

    @abstractmethod
    def linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        """``input @ W.T`` for the weight whose compact form is given.

        Args:
            input: shape ``(..., columns)``.
            compact: shape ``compact_shape(shape)``.
            shape: the dense shape of the weight.

        Returns:
            shape ``(..., rows)``.
        """

    @abstractmethod
    def transposed(self) -> Structure:
        """The structure of the transposed matrix."""

    @abstractmethod
    def _payload(self) -> bytes:
        """The description that follows the kind byte in `to_bytes`."""

    def nnz(self, shape: Shape) -> int:
        """The number of structural nonzeros of a weight of this shape."""
        return math.prod(self.compact_shape(shape))

    def compact_shape(self, shape: Shape) -> tuple[int, ...]:
        """The shape of the compact form, which holds the structural nonzeros and nothing else."""
        return (self.positions(shape).numel(),)

    def mask(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        """boolean, of the given shape: True at the structural nonzeros."""
        self.check(shape)
        flat = torch.zeros(math.prod(shape), dtype=torch.bool, device=device)
        flat[self.positions(shape).to(flat.device)] = True
        return flat.reshape(tuple(shape))

    def to_compact(self, dense: Tensor) -> Tensor:
        """The structural nonzeros of a dense weight. What lies outside the structure is dropped."""
        self.check(dense.shape)
        return dense.flatten()[self.positions(dense.shape).to(dense.device)].reshape(self.compact_shape(dense.shape))

    def to_dense(self, compact: Tensor, shape: Shape) -> Tensor:
        """The dense weight of the given shape, zero outside the structure. Differentiable."""
        flat = compact.new_zeros(math.prod(shape))
        return flat.index_copy(0, self.positions(shape).to(compact.device), compact.flatten()).reshape(tuple(shape))

    @property
    def metadata_bits(self) -> int:
        """The exact size of this description as it is stored: 8 bits for each byte of `to_bytes`."""
        return 8 * len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The stored form: a kind byte, then the rule or the indices of this kind, little-endian.

        Example:
            >>> from pibinn_plugin.structure import BlockDiagonal
            >>> BlockDiagonal(8).to_bytes().hex()
            '010008000000'
        """
        return bytes([self._code]) + self._payload()

    @staticmethod
    def from_bytes(data: bytes) -> Structure:
        """Invert `to_bytes`.

        Raises:
            StructureError: the bytes are not a structure.
        """
        try:
            return Structure._kinds[data[0]]._from_payload(data[1:])
        except (IndexError, KeyError, ValueError, struct.error, OverflowError) as error:
            raise StructureError(f"{len(data)} bytes do not describe a structure: {error!r}") from error

    @classmethod
    @abstractmethod
    def _from_payload(cls, payload: bytes) -> Structure: ...

    def to_json(self) -> str:
        """This structure as JSON text.

        Example:
            >>> from pibinn_plugin.structure import BlockDiagonal
            >>> BlockDiagonal(8).to_json()
            '{"kind": "block_diagonal", "blocks": 8}'
        """
        return json.dumps({"kind": self.kind, **self._json_fields()})

    def _json_fields(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}  # type: ignore[call-overload]

    @staticmethod
    def from_json(text: str) -> Structure:
        """Invert `to_json`.

        Raises:
            StructureError: the text is not the JSON of a structure.
        """
        try:
            fields = json.loads(text)
            return Structure._kinds[str(fields.pop("kind"))]._from_json_fields(fields)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, struct.error) as error:
            raise StructureError(
                f"{text[:80]!r} is not the JSON of a structure ({error!r}); expected "
                f'{{"kind": one of {[kind for kind in Structure._kinds if isinstance(kind, str)]}, ...}}'
            ) from error

    @classmethod
    def _from_json_fields(cls, fields: dict[str, Any]) -> Structure:
        return cls(**fields)


def constant(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor that was made outside, for use in operations that may be traced with fake tensors.

    It is lifted into the trace as ``torch.tensor`` lifts a list of numbers.
    """
    return torch.ops.aten.lift_fresh.default(tensor).to(device)


def whole_number(value: Any) -> int:
    """The value as an int.

    Raises:
        StructureError: it is not a whole number.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise StructureError(f"expected a whole number; got {value!r}") from None


def refuse_leftover(payload: bytes, expected: int) -> None:
    """Raise ``ValueError`` unless the payload of a structure has exactly the expected number of bytes."""
    if len(payload) != expected:
        raise ValueError(f"{len(payload)} bytes where {expected} were expected")
