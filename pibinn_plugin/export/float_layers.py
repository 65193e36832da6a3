"""Packed layers back to the plain layers that they stand for: what exporters know how to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pibinn_plugin.errors import ScaleError
from pibinn_plugin.nn import PackedConv, PackedLinear, compact_layer
from pibinn_plugin.packing import PackedSigns, UnpackSigns
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.structure import Banded, BlockDiagonal
from pibinn_plugin.workflow import global_scale, register_scale


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight in the module that holds it; ``in_place`` where that module is more than a packed layer."""

    name: str
    module_name: str
    module: Any
    parameter_name: str
    packed: PackedSigns
    compact: bool
    dtype: torch.dtype
    in_place: bool


def packed_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[PackedWeight]:
    """The packed weights of a model in the order of ``named_modules``; ``dtype`` is that of λ."""
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, PackedLinear | PackedConv):
            name, packed = f"{prefix}weight", module.packed_signs
            yield PackedWeight(name, module_name, module, "weight", packed, module.compact, dtype, False)
        for key, chain in getattr(module, "parametrizations", {}).items():
            if isinstance(unpack := chain[0], UnpackSigns):
                packed = PackedSigns(chain.original, unpack.structure, unpack.shape)
                yield PackedWeight(prefix + key, module_name, module, key, packed, unpack.compact, unpack.dtype, True)


def with_float_weights(packed: nn.Module) -> tuple[nn.Module, list[PackedWeight]]:
    """The float twin of a packed model, which is used up: the layers it was converted from, with ``λ · S ⊙ M`` in them.

    Returns:
        The twin (another module where the model was a packed layer itself), and what its weights were.
    """
    scale = global_scale(packed)
    weights = [_dense_where_brevitas_needs_it(weight) for weight in packed_weights(packed, scale.value.dtype)]
    values = [weight.packed.weight(scale(), weight.compact, weight.dtype) for weight in weights]
    model = replace_by_float_layers(packed, weights, linear_layer)
    for weight, value in zip(weights, values, strict=True):
        set_float_weight(model.get_submodule(weight.module_name), weight.parameter_name, value)
    return model, weights


def has_empty_blocks(packed: PackedSigns) -> bool:
    """Whether a block has no row or no column, as where an operator does not see an unknown."""
    structure = packed.structure
    return isinstance(structure, BlockDiagonal) and 0 in (*(structure.rows or ()), *(structure.columns or ()))


def _dense_where_brevitas_needs_it(weight: PackedWeight) -> PackedWeight:
    # Brevitas has compact layers for blocks and bands alone, and the ONNX exporter that it uses ends the process with a
    # division by zero at a block without elements.
    has_layer = isinstance(weight.packed.structure, BlockDiagonal | Banded) and not has_empty_blocks(weight.packed)
    return weight if weight.in_place or has_layer else dataclasses.replace(weight, compact=False)


def replace_by_float_layers(
    model: nn.Module, weights: list[PackedWeight], float_linear: Callable[[PackedWeight], nn.Module]
) -> nn.Module:
    """Put a float layer in the place of each packed layer, in place; their weights are empty, on the meta device.

    Args:
        model: a packed model.
        weights: its packed weights.
        float_linear: makes the float layer of a `PackedLinear`.

    Returns:
        The model: another module where it was a packed layer itself.
    """
    for weight in weights:
        if weight.in_place:
            continue
        layer = float_linear(weight) if isinstance(weight.module, PackedLinear) else _convolution(weight)
        layer.bias = weight.module.bias
        layer.train(weight.module.training)
        for name, child in weight.module.named_children():  # λ, where the root is a container
            layer.add_module(name, child)
        if not weight.module_name:
            return layer
        model.set_submodule(weight.module_name, layer)
    return model


def linear_layer(weight: PackedWeight) -> nn.Module:
    """``nn.Linear``, or the compact layer that a `PackedLinear` was converted from."""
    rows, columns = weight.packed.shape
    structure, has_bias = weight.packed.structure, weight.module.bias is not None
    if not weight.compact:
        return nn.Linear(columns, rows, has_bias, device="meta", dtype=weight.dtype)
    return compact_layer(columns, rows, structure, has_bias, device="meta", dtype=weight.dtype)


def set_float_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a plain parameter where it may have had a parametrization."""
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations: it edits the class, which a deepcopy shares with the model it was copied from.
        layer_type, chains = parametrize.type_before_parametrizations(module), module.parametrizations
        del chains[name]  # type: ignore[operator,union-attr]
        if not len(chains):  # type: ignore[arg-type]
            del module.parametrizations
            module.__class__ = layer_type
    module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))


def _convolution(weight: PackedWeight) -> nn.Module:
    packed: PackedConv = weight.module
    rows, channels, *kernel = packed.shape
    layer_type: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    arguments = (packed.stride, packed.padding, packed.dilation, packed.groups, packed.bias is not None)
    columns = channels * packed.groups
    return layer_type(columns, rows, tuple(kernel), *arguments, packed.padding_mode, device="meta", dtype=weight.dtype)


def unwrap_packed_tensors(model: nn.Module) -> None:
    """Turn weights that are packed tensors of the torchao scheme into bits with an `UnpackSigns` in front, in place.

    Raises:
        ScaleError: they have several scales.
    """
    found: list[tuple[Any, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if hasattr(parameter, "packed_signs")
    ]
    values = {tensor.scale.item() for _, _, tensor in found}
    if len(values) > 1:
        raise ScaleError(f"the packed weights have {len(values)} scales ({sorted(values)}); expected one")
    for module, name, tensor in found:
        scale = next((child for child in model.modules() if isinstance(child, GlobalScale)), None)
        if scale is None:
            scale = GlobalScale(1.0, dtype=tensor.scale.dtype)
            register_scale(model, module, scale)
        scale.set(tensor.scale.item())
        packed = tensor.packed_signs
        delattr(module, name)
        module.register_buffer(name, packed.bits)
        unpack = UnpackSigns(scale, packed.structure, packed.shape, False, tensor.dtype)
        # unsafe: bytes go in and floating-point weights come out.
        parametrize.register_parametrization(module, name, unpack, unsafe=True)
