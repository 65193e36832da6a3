"""The packed weight of the torchao scheme: a tensor subclass, one bit for each structural nonzero."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from typing_extensions import override

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.functional import packed_linear
from pibinn_plugin.kernel import native
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.schemes.quiet_import import quiet_import
from pibinn_plugin.structure import Dense, Structure

with quiet_import():
    from torchao.utils import TorchAOBaseTensor

__all__ = ["PIBiNNTensor"]

aten = torch.ops.aten


@lru_cache(maxsize=1024)
def _structure(text: str) -> Structure:
    return Structure.from_json(text)


class PIBiNNTensor(TorchAOBaseTensor):
    """A packed weight as a tensor: ``λ · S ⊙ M`` with one bit for each structural nonzero.

    Args:
        bits: uint8, shape ``(ceil(nnz / 8),)``, the packed signs.
        scale: λ, shape ``(1,)``, on the same device.
        structure: where the structural nonzeros are, as the JSON text of a `Structure`.
        dense_shape: the shape that the tensor has.
        dtype: the dtype that the tensor has.
    """

    tensor_data_names: ClassVar[list[str]] = ["bits", "scale"]
    tensor_attribute_names: ClassVar[list[str]] = ["structure", "dense_shape", "dtype"]

    @staticmethod
    @override
    def __new__(
        cls: type, bits: Tensor, scale: Tensor, structure: str, dense_shape: list[int], dtype: torch.dtype
    ) -> PIBiNNTensor:
        return torch.Tensor._make_wrapper_subclass(cls, dense_shape, dtype=dtype, device=bits.device)

    def __init__(self, bits: Tensor, scale: Tensor, structure: str, dense_shape: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.scale, self.structure, self.dense_shape = bits, scale, structure, list(dense_shape)
        # Now: compiled code has no real tensors to read a mask into, or to make an index of.
        native.layout_of(_structure(structure), tuple(dense_shape))

    @property
    def packed_signs(self) -> PackedSigns:
        """The signs, as every scheme stores them. Raises `StructureError` where bits, structure and shape disagree."""
        return PackedSigns(self.bits, _structure(self.structure), tuple(self.dense_shape))

    @classmethod
    def from_hp(cls, weight: Tensor, structure: Structure | None = None, scale: Tensor | None = None) -> PIBiNNTensor:
        """Pack a float weight: its signs inside a structure.

        Args:
            weight: shape ``(rows, columns, ...)``, floating point.
            structure: where it may be nonzero; None means `Dense`.
            scale: λ, shape ``(1,)``; the mean of ``|V|`` over the structural nonzeros unless given.

        Raises:
            StructureError: the structure does not fit, or a weight is not finite.

        Example:
            >>> PIBiNNTensor.from_hp(torch.tensor([[1.0, -3.0]])).dequantize()
            tensor([[ 2., -2.]])
        """
        structure = structure or Dense()
        packed = PackedSigns.pack(weight, structure, weight.shape)
        if scale is None:
            scale = structure.to_compact(weight.detach()).abs().mean(dtype=torch.float32).to(weight.dtype).reshape(1)
        return cls(packed.bits, scale, structure.to_json(), list(weight.shape), weight.dtype)

    @classmethod
    @override
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in cls._ATEN_OP_TABLE[cls]:
            return super().__torch_dispatch__(func, types, args, kwargs)
        # Read by whatever else: as the weight that it is.
        if func._schema.is_mutable:
            raise PIBiNNError(f"a packed weight is read only; {func} would write to it")
        args, kwargs = pytree.tree_map_only(PIBiNNTensor, PIBiNNTensor.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``λ · S ⊙ M``, in this tensor's dtype or another."""
        return self.packed_signs.weight(self.scale, False, output_dtype or self.dtype)


torch.serialization.add_safe_globals([PIBiNNTensor])


class PackedTensorRule:
    """How a `PIBiNNTensor` is read, for the walker of weights."""

    compact = False

    def __init__(self, tensor: PIBiNNTensor) -> None:
        self.structure, self.shape = _structure(tensor.structure), tuple(tensor.dense_shape)
        self.scale, self.dtype = tensor.scale, tensor.dtype


@PIBiNNTensor.implements(aten.linear.default)
@PIBiNNTensor.implements_torch_function(F.linear)
def _linear(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    input, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    structure = _structure(weight.structure)
    return packed_linear(input, weight.bits, weight.scale, structure, tuple(weight.dense_shape), bias)


@PIBiNNTensor.implements(aten._to_copy.default)
def _to_copy(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    # torchao's own implementation drops the dtype.
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **kwargs)
    # Clones: a copy that was asked for shares nothing.
    bits, scale = self.bits.clone().to(to["device"]), self.scale.clone().to(to["device"], to["dtype"])
    copy = PIBiNNTensor(bits, scale, self.structure, self.dense_shape, to["dtype"])
    return return_and_correct_aliasing(func, args, kwargs, copy)
