"""The scheme in Brevitas: a weight quantizer for its layers, and a compact layer for block weights.

>>> import brevitas.nn as qnn
>>> from pibinn_plugin import BlockDiagonal
>>> scale = GlobalScale(0.1)
>>> first = qnn.QuantLinear(16, 8, weight_quant=PIBiNNWeightQuant.let(scaling_impl=scale, mask=BlockDiagonal(4)))
>>> last = qnn.QuantLinear(8, 8, weight_quant=PIBiNNWeightQuant, weight_scaling_impl=scale)
>>> model = nn.Sequential(first, nn.ReLU(), last)
>>> sum(parameter is scale.value for parameter in model.parameters())
1

The first layer that takes a `GlobalScale` registers it; the others hold a reference. ``prepare(model, targets,
scheme="brevitas")`` registers it at the root, swaps float layers, and in Brevitas layers replaces the weight quantizer
alone: input, bias and output quantizers stay.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas import config
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.utils import StatelessBuffer
from brevitas.inject import ExtendedInjector
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.errors import ScaleError, TargetError
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, compact_linear
from pibinn_plugin.quantizer import GlobalScale, SignQuantizer
from pibinn_plugin.structure import BlockDiagonal, Dense, Mask, Structure
from pibinn_plugin.targets import Target, check_own_forward, check_readers


class PIBiNNTensorQuant(nn.Module):
    """Brevitas' ``tensor_quant`` contract: V to (value, scale, zero point, bit width).

    The bit width is 2 (signed, narrow range: {-1, 0, 1}) where the weight has structural zeros, because 0 is no bipolar
    value and an ``IntQuantTensor`` would be invalid; 1 where it has none. What is stored is 1 bit either way.

    Args:
        scaling_impl: the network's λ.
        tracked_parameter_list: the weight, from Brevitas.
        mask: M, as a `Structure` or a tensor in the shape of the weight; None means `Dense`.
        dense_shape: of a weight in compact form; None for an ordinary weight.

    Raises:
        StructureError: the mask does not fit the weight.
        ScaleError: ``scaling_impl`` is no `GlobalScale`.
    """

    def __init__(
        self,
        scaling_impl: GlobalScale,
        tracked_parameter_list: Sequence[Tensor],
        mask: Structure | Tensor | None = None,
        dense_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(scaling_impl, GlobalScale):
            raise ScaleError(f"scaling_impl must be the network's GlobalScale; got {type(scaling_impl).__name__}")
        weight = tracked_parameter_list[0]
        structure = mask if isinstance(mask, Structure) else Dense() if mask is None else Mask(mask)
        shape = tuple(weight.shape) if dense_shape is None else dense_shape
        self.sign_quantizer = _SignQuantizer(scaling_impl, structure, shape, dense_shape is not None, weight.device)
        if not scaling_impl.is_registered:
            self.scaling_impl = scaling_impl
            scaling_impl.is_registered = True
        scaling_impl.register_load_state_dict_pre_hook(_forgive_missing_scale)
        self.bit_width = BitWidthConst(1 if self.sign_quantizer.mask is None else 2)
        self.zero_point = StatelessBuffer(torch.tensor(0.0))

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = self.sign_quantizer.scale().to(x.dtype)
        return self.sign_quantizer(x), scale, self.zero_point(), self.bit_width()


class _SignQuantizer(SignQuantizer):
    """Honours ``IGNORE_MISSING_KEYS``, with which Brevitas loads float checkpoints: they hold no structure."""

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys = args[2]
        if config.IGNORE_MISSING_KEYS and (key := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(key)


class PIBiNNWeightQuantProxy(WeightQuantProxyFromInjector):
    """Builds ``tensor_quant`` once.

    Stock proxies rebuild it from the injector at every ``load_state_dict``. Injectors are classes, which deepcopy does
    not copy: a rebuild in a copied model would silently tie its λ to the original's.
    """

    def __init__(self, quant_layer: nn.Module, quant_injector: Any) -> None:
        super().__init__(quant_layer, quant_injector)
        # Without our handlers Brevitas' exporters, which need onnx, fail halfway and leave the model in export mode.
        if importlib.util.find_spec("onnx") is not None:
            importlib.import_module("pibinn_plugin.schemes.brevitas_export").register()

    @override
    def init_tensor_quant(self, preserve_state_dict: bool = False) -> None:
        if self.tensor_quant is None:
            super().init_tensor_quant(preserve_state_dict)

    @override
    def add_tracked_module(self, module: nn.Module) -> None:
        if len(self.tracked_module_list) > 0:
            raise ScaleError("one weight quantizer serves one layer; share the GlobalScale, not the quantizer")
        super().add_tracked_module(module)

    @property
    def sign_quantizer(self) -> SignQuantizer | None:
        """The reference quantizer behind this proxy."""
        return None if self.tensor_quant is None else self.tensor_quant.sign_quantizer


class PIBiNNWeightQuant(ExtendedInjector):
    """The weight quantizer: ``λ · sign(V) ⊙ M``.

    ``weight_quant=PIBiNNWeightQuant.let(scaling_impl=scale, mask=structure)``, or as layer arguments
    ``weight_quant=PIBiNNWeightQuant, weight_scaling_impl=scale, weight_mask=structure``.
    """

    proxy_class = PIBiNNWeightQuantProxy
    tensor_quant = PIBiNNTensorQuant
    signed = True
    narrow_range = True
    float_to_int_impl_type = "round"
    rounding_mode = "ROUND"


class _QuantCompact(QuantWeightBiasInputOutputLayer):
    """What Brevitas asks of a layer with a weight, for the compact layers."""

    output_channel_dim = 0
    channelwise_separable = False

    def _quantize(self: Any, weight_quant: Any, **kwargs: Any) -> None:
        kwargs = {"bias_quant": None, "input_quant": None, "output_quant": None, "return_quant_tensor": False} | kwargs
        kwargs |= {"weight_mask": self.structure, "weight_dense_shape": self.dense_shape}
        QuantWeightBiasInputOutputLayer.__init__(self, weight_quant, **kwargs)

    @property
    def out_channels(self: Any) -> int:
        """Brevitas' name for the rows."""
        return self.out_features

    def forward(self, input: Any) -> Any:
        """Input ``(..., columns)``, output ``(..., rows)``; either may be a Brevitas ``QuantTensor``."""
        return self.forward_impl(input)

    @override
    def inner_forward_impl(self: Any, x: Tensor, quant_weight: Tensor, quant_bias: Tensor | None) -> Tensor:
        values: list[Any] = [getattr(operand, "value", operand) for operand in (x, quant_weight, quant_bias)]
        return compact_linear(values[0], values[1], self.structure, self.dense_shape, values[2])


class QuantBlockDiagonalLinear(_QuantCompact, BlockDiagonalLinear):
    """`BlockDiagonalLinear` as a Brevitas layer: block weights without zeros, quantized in compact form.

    Args:
        in_features: columns of the dense weight.
        out_features: rows of the dense weight.
        blocks: the number of equal blocks, or a `BlockDiagonal`.
        bias: whether there is a bias.
        weight_quant: a weight quantizer, such as ``PIBiNNWeightQuant.let(scaling_impl=scale)``.
        device: of the parameters.
        dtype: of the parameters.
        **kwargs: Brevitas' other arguments: ``input_quant``, ``bias_quant``, ``output_quant``, ``return_quant_tensor``.

    Example:
        >>> quantizer = PIBiNNWeightQuant.let(scaling_impl=GlobalScale(0.5))
        >>> layer = QuantBlockDiagonalLinear(8, 4, 2, weight_quant=quantizer)
        >>> layer.quant_weight().value.shape, layer.quant_weight().bit_width.item()
        (torch.Size([2, 2, 4]), 1.0)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int | BlockDiagonal,
        bias: bool = True,
        weight_quant: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        BlockDiagonalLinear.__init__(self, in_features, out_features, blocks, bias, device, dtype)
        self._quantize(weight_quant, **kwargs)


class QuantBandedLinear(_QuantCompact, BandedLinear):
    """`BandedLinear` as a Brevitas layer; arguments as for `QuantBlockDiagonalLinear`, with the band's diagonals."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        lower: int,
        upper: int,
        bias: bool = True,
        weight_quant: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        BandedLinear.__init__(self, in_features, out_features, lower, upper, bias, device, dtype)
        self._quantize(weight_quant, **kwargs)


def _linear_arguments(layer: Any) -> dict[str, Any]:
    return {"in_features": layer.in_features, "out_features": layer.out_features}


def _conv_arguments(layer: Any) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def _block_diagonal_arguments(layer: Any) -> dict[str, Any]:
    return {**_linear_arguments(layer), "blocks": layer.structure}


def _banded_arguments(layer: Any) -> dict[str, Any]:
    return {**_linear_arguments(layer), "lower": layer.structure.lower, "upper": layer.structure.upper}


# The float layer, the Brevitas layer that replaces it, and how its arguments are read off.
_QUANT_LAYERS: dict[type[nn.Module], tuple[Any, Callable[[Any], dict[str, Any]]]] = {
    nn.Linear: (qnn.QuantLinear, _linear_arguments),
    nn.Conv1d: (qnn.QuantConv1d, _conv_arguments),
    nn.Conv2d: (qnn.QuantConv2d, _conv_arguments),
    BlockDiagonalLinear: (QuantBlockDiagonalLinear, _block_diagonal_arguments),
    BandedLinear: (QuantBandedLinear, _banded_arguments),
}


def check(root: nn.Module, target: Target) -> None:
    """Raise `TargetError` unless the target is the weight of a layer that can be swapped, or of a Brevitas layer."""
    check_own_forward(target)
    check_readers(root, target)
    if target.parameter_name == "weight" and isinstance(target.module, QuantWeightBiasInputOutputLayer):
        return
    if target.parameter_name != "weight" or type(target.module) not in _QUANT_LAYERS:
        known = ", ".join(layer.__name__ for layer in _QUANT_LAYERS)
        raise TargetError(
            f'{target}: Brevitas quantizes the weight of {known} and of its own layers; use scheme="native" for '
            f"anything else"
        )
    if not target.module_name:
        raise TargetError(
            f"{target} is the root of the model and cannot be swapped for a Brevitas layer in place: wrap it in "
            f'nn.Sequential, or use scheme="native"'
        )
    if target.module._forward_hooks or target.module._forward_pre_hooks:
        raise TargetError(f"{target} has forward hooks, which a swap would lose; add them after prepare")


def attach(root: nn.Module, target: Target, scale: GlobalScale) -> None:
    """Swap a float layer for its Brevitas layer, then give it the weight quantizer; its other quantizers stay."""
    module: Any = target.module
    if type(module) in _QUANT_LAYERS:
        module = _swap(root, target)
    dense_shape = target.shape if target.compact else None
    quantizer = PIBiNNWeightQuant.let(scaling_impl=scale, mask=target.structure, dense_shape=dense_shape)
    module.weight_quant = PIBiNNWeightQuantProxy(module, quantizer).train(module.training)


def _swap(root: nn.Module, target: Target) -> nn.Module:
    float_layer: Any = target.module
    quant_layer_type, arguments = _QUANT_LAYERS[type(float_layer)]
    has_bias = float_layer.bias is not None
    # On meta: the parameters of the float layer move in, none are made.
    layer = quant_layer_type(**arguments(float_layer), bias=has_bias, weight_quant=None, device="meta")
    layer.weight, layer.bias = float_layer.weight, float_layer.bias
    layer.replaced_type = type(float_layer)  # convert packs it as that layer: it quantizes nothing but its weight
    root.set_submodule(target.module_name, layer.train(float_layer.training))
    return layer


def _forgive_missing_scale(scale: Any, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A float checkpoint holds no λ; Brevitas loads it under ``IGNORE_MISSING_KEYS``."""
    if config.IGNORE_MISSING_KEYS:
        state_dict.setdefault(f"{prefix}value", scale.value)
