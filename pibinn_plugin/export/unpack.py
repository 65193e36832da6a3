"""From packed signs to a weight in operations that every exporter knows, without an index for each weight.

A packed model scatters its signs to the structural nonzeros by an int64 index each: fast, but 64 bits a weight once an
exporter writes that index down as a constant. Here the signs are in row-major order and the mask is computed from the
rule (`rules.py`): the place of a sign is then the count of structural nonzeros before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.bits import pack_bits, unpack_bits
from pibinn_plugin.export.rules import BitmapRule, rule_of
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.parametrized import stop_parametrizing
from pibinn_plugin.structure import Dense


class UnpackForExport(nn.Module):
    """A torch parametrization from bits, uint8 of shape ``(bytes,)``, to the weight ``λ · S ⊙ M``.

    Args:
        scale: holds λ as ``scale.value``, shape ``(1,)``, positive.
        packed: the weight.
        compact: True for the structure's compact form in place of the dense weight.
        dtype: of the weight.
    """

    def __init__(self, scale: nn.Module, packed: PackedSigns, compact: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self._scale = (scale,)
        self.dtype, self.count = dtype, packed.nnz
        self.shape = packed.structure.compact_shape(packed.shape) if compact else packed.shape
        is_full = compact or isinstance(packed.structure, Dense)
        self.rule = None if is_full else rule_of(packed.structure, packed.shape)

    @override
    def forward(self, bits: Tensor) -> Tensor:
        scale: Any = self._scale[0].value
        if scale.dtype != self.dtype:  # asked, because a conversion to the same dtype is a node in every exported graph
            scale = scale.to(self.dtype)
        values = torch.where(unpack_bits(bits, self.count), scale, -scale)
        if self.rule is not None:
            mask = self.rule()
            places = (mask.to(torch.int64).cumsum(0) - 1).clamp_min(0)
            # Zero from λ: what is made of no tensor is no constant to AOTInductor.
            values = torch.where(mask, values.index_select(0, places), scale - scale)
        return values.reshape(self.shape)

    def store_mask(self) -> None:
        """Hold one bit for each element in the place of a rule, which a compiler would compute in every call."""
        if self.rule is not None:
            self.rule = BitmapRule(self.rule())


def row_major_bits(packed: PackedSigns) -> Tensor:
    """The packed signs in the order of the dense weight's elements, uint8 of shape ``(bytes,)``."""
    dense = packed.structure.to_dense(packed.signs(), packed.shape)
    return pack_bits(dense[packed.structure.mask(packed.shape, dense.device)] > 0)


def unpack_now(model: nn.Module) -> None:
    """Put the values of all exportable weights in their places, in place: float parameters, as layers without bits."""
    for module in list(model.modules()):
        for name, chain in list(getattr(module, "parametrizations", {}).items()):
            if isinstance(chain[0], UnpackForExport):
                value = getattr(module, name).detach()
                stop_parametrizing(module, name)
                module.register_parameter(name, nn.Parameter(value, False))
