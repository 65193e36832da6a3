"""The base class of the structures: what a pattern of structural nonzeros can do."""

from __future__ import annotations

import json
import math
import operator
import reprlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence, Set
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pibinn_plugin.errors import StructureError

Shape = Sequence[int]

# No array library has more dimensions or counts further; what exceeds this is a damaged file.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 2**62
_LARGEST_NUMBER = 2**32 - 1  # of what a stored structure counts


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """The matrix that a weight of this shape is seen as: ``(shape[0], prod(shape[1:]))``, one row for a vector.

    Example:
        >>> matrix_shape((16, 4, 3, 3))
        (16, 36)
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    return int(shape[0]), math.prod(shape[1:])


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = 8
        self.maxstring = self.maxother = 160

    def repr_int(self, x: int, level: int) -> str:
        # Python itself refuses to write out numbers of more than some thousand digits.
        return super().repr_int(x, level) if x.bit_length() < 256 else f"<a number of {x.bit_length()} bits>"


def short(value: object) -> str:
    """``repr(value)`` cut in the middle: what a message shows of a value that a file may make as long as it likes.

    Example:
        >>> short(tuple(range(1000)))
        '(0, 1, 2, 3, 4, 5, 6, 7, ...)'
    """
    return _Brief().repr(value)


def check_shape(shape: Shape) -> None:
    """Raise `StructureError` unless a weight can have this shape: at most 64 dimensions, none empty, 2⁶² elements."""
    if len(shape) > _MOST_DIMENSIONS:
        raise StructureError(f"a weight of {len(shape)} dimensions; expected at most {_MOST_DIMENSIONS}")
    if min(shape, default=1) < 1:
        raise StructureError(f"a weight of shape {short(tuple(shape))} is empty; expected at least one element")
    if math.prod(shape) > _MOST_ELEMENTS:
        raise StructureError(f"a weight of shape {short(tuple(shape))} has more than 2^62 elements")


def check_columns(input: Tensor, shape: Shape) -> None:
    """Raise `StructureError` unless a weight of this shape can multiply the input: bands and orders would not look."""
    columns = matrix_shape(shape)[1]
    features = input.size(-1) if input.dim() else 0  # of a nested tensor this can be asked, its shape cannot
    if features != columns:
        raise StructureError(
            f"the input has {features} features on its last axis; a weight of shape {tuple(shape)} takes {columns}"
        )


class Structure(ABC):
    """A fixed pattern of structural nonzeros. Subclasses are frozen dataclasses without a ``repr`` of their own."""

    kind: ClassVar[str]
    _code: ClassVar[int]
    _kinds: ClassVar[dict[str | int, type[Structure]]] = {}

    def __init_subclass__(cls) -> None:
        Structure._kinds[cls.kind] = Structure._kinds[cls._code] = cls

    def __repr__(self) -> str:
        values = (f"{field.name}={short(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(values)})"

    def check(self, shape: Shape) -> None:
        """Raise `StructureError` if a weight of this shape cannot have this structure.

        Nothing is made for it, and nothing for `nnz` either: call both before anything of a file is believed.
        """
        check_shape(shape)
        self._check(shape)

    @abstractmethod
    def _check(self, shape: Shape) -> None:
        """As `check`, for a shape that some weight can have."""

    @abstractmethod
    def positions(self, shape: Shape) -> Tensor:
        """int64, shape ``(nnz,)``: the flat index in the dense weight of each compact element, in compact order."""

    def linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        """``input @ W.T`` for the weight whose compact form is given.

        Args:
            input: shape ``(..., columns)``.
            compact: shape ``compact_shape(shape)``.
            shape: the dense shape of the weight.

        Returns:
            shape ``(..., rows)``.

        Raises:
            StructureError: the input has another number of columns.
        """
        check_columns(input, shape)
        return self._linear(input, compact, shape)

    @abstractmethod
    def _linear(self, input: Tensor, compact: Tensor, shape: Shape) -> Tensor:
        """As `linear`, for an input that fits."""

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
        positions = self.positions(shape) if compact.is_cpu else self._positions_on(compact.device, shape)
        return compact.new_zeros(math.prod(shape)).index_copy(0, positions, compact.flatten()).reshape(tuple(shape))

    def _positions_on(self, device: torch.device, shape: Shape) -> Tensor:
        """The positions on a device, where they stay: while it captures a graph, none could be copied to it."""
        if is_traced():
            return constant(self.positions(shape), device)
        known = _positions.setdefault(self, {})
        key = (tuple(shape), device)
        if key not in known:
            with torch.inference_mode(False):
                known[key] = self.positions(shape).to(device)
        return known[key]

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
        """Invert `to_bytes`, in time and memory that go with the bytes, whatever size of weight they describe.

        Who knows which structure is right compares ``structure.to_bytes()`` with the stored bytes instead: equal
        structures are stored in equal bytes. Who does not calls `check` with the shape of the weight and compares `nnz`
        with the number of bits that were stored, before anything else.

        Raises:
            StructureError: the bytes are no structure, or one that `to_bytes` writes otherwise.
        """
        try:
            structure = Structure._kinds[data[0]]._from_payload(data[1:])
        except (IndexError, KeyError, ValueError, struct.error, OverflowError) as error:
            raise StructureError(f"{len(data)} bytes do not describe a structure: {short(error)}") from error
        if structure.to_bytes() != data:
            raise StructureError(f"{len(data)} bytes describe {structure}, but are not its stored form")
        return structure

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
        """Invert `to_json`, at no more than `from_bytes` costs.

        Raises:
            StructureError: the text is not the JSON of a structure.
        """
        try:
            members = json.loads(text, object_pairs_hook=unique_members)
            return Structure._kinds[str(members.pop("kind"))]._from_json_fields(members)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, struct.error) as error:
            raise StructureError(
                f"{short(text)} is not the JSON of a structure ({short(error)}); expected "
                f'{{"kind": one of {[kind for kind in Structure._kinds if isinstance(kind, str)]}, ...}}'
            ) from error

    @classmethod
    def _from_json_fields(cls, fields: dict[str, Any]) -> Structure:
        return cls(**fields)


def constant(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor that was made outside, for use in operations that may be traced with fake tensors.

    It is lifted into the trace as ``torch.tensor`` lifts a list of numbers. In eager code a device gets one copy, which
    lives as long as the tensor: to copy an index from the CPU at each use would let the device wait each time.
    """
    lifted = torch.ops.aten.lift_fresh.default(tensor)
    if lifted.device == torch.device(device):
        return lifted
    if type(lifted) is not Tensor or is_traced():
        return lifted.to(device)
    copies = _copies.setdefault(lifted, {})
    if device not in copies:
        with torch.inference_mode(False):
            copies[device] = lifted.to(device)
    return copies[device]


def is_traced() -> bool:
    """Whether operations go into a graph: of the compiler, or of a mode that sees each of them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_known(condition: bool | torch.SymBool) -> bool:
    """A condition on the sizes of a tensor; in a graph for tensors of many sizes, whether it holds for all of them."""
    if not torch.compiler.is_compiling() and isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # the compiler, which is there then

    return statically_known_true(condition)


_copies: MutableMapping[Tensor, dict[torch.device | str, Tensor]] = WeakIdKeyDictionary()
_positions: MutableMapping[Structure, dict[tuple[tuple[int, ...], torch.device], Tensor]] = WeakIdKeyDictionary()


def steps_in_groups(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For elements that stand group by group: the group of each, and its place in the group.

    Args:
        counts: int64, the number of elements of each group.
        total: of all groups. A graph that is traced needs it beforehand.

    Example:
        >>> steps_in_groups(torch.tensor([2, 0, 3]), 5)
        (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    group = torch.arange(len(counts), device="cpu").repeat_interleave(counts, output_size=total)
    return group, torch.arange(total, device="cpu") - (counts.cumsum(0) - counts)[group]


def whole_number(value: Any) -> int:
    """The value as an int.

    Raises:
        StructureError: it is not a whole number, or one beyond the 32 bits of the stored form.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise StructureError(f"expected a whole number; got {short(value)}") from None
    if isinstance(value, bool) or abs(number) > _LARGEST_NUMBER:
        raise StructureError(f"expected a whole number of at most {_LARGEST_NUMBER}; got {short(value)}")
    return number


def whole_numbers(values: Any) -> tuple[int, ...]:
    """The values as a tuple of ints.

    Raises:
        StructureError: not a list of whole numbers, or one beyond the 32 bits of the stored form.
    """
    if isinstance(values, str | Set | Mapping) or not isinstance(values, Iterable):  # the latter two have another order
        raise StructureError(f"expected a list of whole numbers; got {short(values)}")
    return tuple(map(whole_number, values))


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object, as ``object_pairs_hook`` of ``json.loads``, which takes the last of equal names.

    Raises:
        ValueError: a name is given twice.
    """
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{short(name)} is given twice")
        members[name] = value
    return members


def refuse_leftover(payload: bytes, expected: int) -> None:
    """Raise ``ValueError`` unless the payload of a structure has exactly the expected number of bytes."""
    if len(payload) != expected:
        raise ValueError(f"{len(payload)} bytes where {expected} were expected")
