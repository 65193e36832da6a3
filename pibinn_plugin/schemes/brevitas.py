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
scheme="brevitas")`` registers it at the root, turns float layers into Brevitas layers in place, and in Brevitas layers
replaces the weight quantizer alone: input, bias and output quantizers stay.

``layer.weight`` reads as W, also where Brevitas reads it: the weight quantizer adds scale, zero point and bit width to
a value that is quantized already. So slices (GPTQ), calibration and bias correction see W, or V ⊙ M where quantization
is disabled.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas import config
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.utils import StatelessBuffer
from brevitas.export.inference import quant_inference_mode
from brevitas.inject import ExtendedInjector
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from pibinn_plugin.errors import PIBiNNError, ScaleError, TargetError
from pibinn_plugin.nn import CompactLinear, compact_linear
from pibinn_plugin.quantizer import GlobalScale, OneBitRule, SignQuantizer, real_device
from pibinn_plugin.schemes.base import Scheme
from pibinn_plugin.schemes.weight_property import WeightReadsAsW, read_as_w, stop_reading_as_w
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask, Structure
from pibinn_plugin.targets import Target
from pibinn_plugin.weights import Place


class PIBiNNTensorQuant(nn.Module):
    """Brevitas' ``tensor_quant`` contract: W to (value, scale, zero point, bit width).

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
        scaling_impl.register_in(self, "scaling_impl")
        scaling_impl.register_load_state_dict_pre_hook(_forgive_missing_scale)
        has_zeros = structure.nnz(shape) < weight.numel()  # a weight in compact form has none
        self.bit_width = BitWidthConst(2 if has_zeros else 1)
        self.zero_point = StatelessBuffer(torch.tensor(0.0))

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x, self.sign_quantizer.scale().to(x.dtype), self.zero_point(), self.bit_width()


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
        _refuse_unknown(quant_injector)
        super().__init__(quant_layer, quant_injector)
        # Without our handlers Brevitas' exporters, which need onnx, fail halfway and leave the model in export mode.
        if importlib.util.find_spec("onnx") is not None:
            from pibinn_plugin.schemes import brevitas_export  # with onnx, which only exporters need

            brevitas_export.register(PIBiNNWeightQuantProxy)
        if not isinstance(quant_layer, _ReadsAsW) and not parametrize.is_parametrized(quant_layer, "weight"):
            read_as_w(quant_layer, _ReadsAsW)

    @override
    def init_tensor_quant(self, preserve_state_dict: bool = False) -> None:
        if self.tensor_quant is None:
            super().init_tensor_quant(preserve_state_dict)
        elif self.sign_quantizer is not None and not self._is_loading:
            raise PIBiNNError(
                "Brevitas has changed the weight and asks for a new quantizer, but this weight is one-bit, "
                "λ · sign(V) ⊙ M: merge BatchNorm and equalize before prepare, or preprocess with merge_bn=False"
            )

    _is_loading = False

    @override
    def _load_from_state_dict(self, *args: Any) -> None:
        self._is_loading = True
        try:
            super()._load_from_state_dict(*args)
        finally:
            self._is_loading = False

    @override
    def add_tracked_module(self, module: nn.Module) -> None:
        if len(self.tracked_module_list) > 0:
            raise ScaleError("one weight quantizer serves one layer; share the GlobalScale, not the quantizer")
        super().add_tracked_module(module)

    @property
    def sign_quantizer(self) -> SignQuantizer | None:
        """The reference quantizer behind this proxy; None once the weight is packed."""
        quantizer = None if self.tensor_quant is None else self.tensor_quant.sign_quantizer
        return quantizer if isinstance(quantizer, SignQuantizer) else None


def _refuse_unknown(injector: Any) -> None:
    """Brevitas takes any argument that begins with ``weight_``, and drops what no part of a quantizer asks for."""
    known = {*_names(PIBiNNWeightQuant), *_ARGUMENTS}
    if unknown := sorted(_names(injector) - known):
        raise PIBiNNError(
            f"PIBiNNWeightQuant knows no {', '.join(unknown)}; expected scaling_impl and mask (as arguments of a layer "
            f"weight_scaling_impl and weight_mask)"
        )


# What is given by the user, by `prepare` and by Brevitas itself.
_ARGUMENTS = ("scaling_impl", "mask", "dense_shape", "proxy_module", "module", "tracked_parameter_list")


def _names(injector: Any) -> set[str]:
    return {name for name in injector.__dependencies__ if not name.startswith("__")}


class _ReadsAsW(WeightReadsAsW):
    """A Brevitas layer whose ``weight`` reads as W."""

    _is_quantizing = False

    def quant_weight(self, *args: Any, **kwargs: Any) -> Any:
        """W as Brevitas' own quantized tensor, from the latent, which it asks for as ``weight``."""
        if not getattr(self.weight_quant, "export_mode", False):  # nothing to tell apart, and nothing for dynamo to see
            return super().quant_weight(*args, **kwargs)  # type: ignore[misc]
        self._is_quantizing = True
        try:
            return super().quant_weight(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._is_quantizing = False

    @override
    def weight_of_latent(self, latent: Tensor) -> Tensor:
        proxy: Any = self.weight_quant
        quantizer = getattr(proxy, "sign_quantizer", None)
        if quantizer is None:  # another quantizer took its place
            return latent
        if proxy.export_mode and not self._is_quantizing:  # read outside the layer, or beside its product
            return self.quant_weight().value
        if proxy.export_mode:  # a handler quantizes
            return latent if quantizer.signs is None else quantizer.signs.to(latent)
        return quantizer.masked(latent) if proxy.disable_quant else quantizer(latent)


class _Packed(OneBitRule):
    """In the place of a `SignQuantizer` whose weight is packed: what is read is W already."""

    @property
    def mask(self) -> Tensor | None:
        """M where the weight has structural zeros, for Brevitas' exporters: made when it is asked for."""
        is_full = self.compact or self.structure.nnz(self.shape) == torch.Size(self.shape).numel()
        return None if is_full else self.structure.mask(self.shape)

    @override
    def forward(self, weight: Tensor) -> Tensor:
        return weight


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


class QuantCompactLinear(QuantWeightBiasInputOutputLayer, CompactLinear):
    """`CompactLinear` as a Brevitas layer: a weight without zeros, quantized in compact form.

    Args:
        in_features: columns of the dense weight.
        out_features: rows of the dense weight.
        structure: where the weight may be nonzero.
        bias: whether there is a bias.
        weight_quant: a weight quantizer, such as ``PIBiNNWeightQuant.let(scaling_impl=scale)``.
        device: of the parameters.
        dtype: of the parameters.
        **kwargs: Brevitas' other arguments: ``input_quant``, ``bias_quant``, ``output_quant``, ``return_quant_tensor``.

    Raises:
        StructureError: the structure does not fit.

    Example:
        >>> quantizer = PIBiNNWeightQuant.let(scaling_impl=GlobalScale(0.5))
        >>> layer = QuantCompactLinear(8, 4, BlockDiagonal(2), weight_quant=quantizer)
        >>> layer.quant_weight().value.shape, layer.quant_weight().bit_width.item()
        (torch.Size([2, 2, 4]), 1.0)
    """

    output_channel_dim = 0
    channelwise_separable = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: Structure,
        bias: bool = True,
        weight_quant: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        CompactLinear.__init__(self, in_features, out_features, structure, bias, device, dtype)
        _add_quantizers(self, weight_quant, **kwargs)

    @property
    def out_channels(self) -> int:
        """Brevitas' name for the rows."""
        return self.out_features

    @override
    def forward(self, input: Any) -> Any:
        """Input ``(..., columns)``, output ``(..., rows)``; either may be a Brevitas ``QuantTensor``."""
        layer: Any = self
        return layer.forward_impl(input)

    @override
    def inner_forward_impl(self: Any, x: Any, quant_weight: Any, quant_bias: Any) -> Any:
        if isinstance(x, QuantTensor) and isinstance(quant_weight, QuantTensor) and self.return_quant_tensor:
            # Brevitas knows scale and bit width of the product of a dense weight. Its zeros take two bits.
            value, bits = self.structure.to_dense(quant_weight.value, self.dense_shape), quant_weight.bit_width + 1
            return nn.functional.linear(x, quant_weight.set(value=value, bit_width=bits), quant_bias)
        values: list[Any] = [getattr(operand, "value", operand) for operand in (x, quant_weight, quant_bias)]
        return compact_linear(values[0], values[1], self.structure, self.dense_shape, values[2])


def QuantBlockDiagonalLinear(  # noqa: N802 - reads as the layer that it makes
    in_features: int, out_features: int, blocks: int | BlockDiagonal, *args: Any, **kwargs: Any
) -> QuantCompactLinear:
    """A `QuantCompactLinear` of blocks: ``blocks`` equal ones, or those of a `BlockDiagonal`."""
    structure = BlockDiagonal(blocks) if isinstance(blocks, int) else blocks
    return QuantCompactLinear(in_features, out_features, structure, *args, **kwargs)


def QuantBandedLinear(  # noqa: N802 - reads as the layer that it makes
    in_features: int, out_features: int, lower: int, upper: int, *args: Any, **kwargs: Any
) -> QuantCompactLinear:
    """A `QuantCompactLinear` of the diagonals from ``lower`` below the main one to ``upper`` above it."""
    return QuantCompactLinear(in_features, out_features, Banded(lower, upper), *args, **kwargs)


def _add_quantizers(layer: Any, weight_quant: Any, **kwargs: Any) -> None:
    """What Brevitas' layers add to a float layer: proxies, by default of nothing."""
    kwargs = {"bias_quant": None, "input_quant": None, "output_quant": None, "return_quant_tensor": False} | kwargs
    if isinstance(layer, CompactLinear):
        kwargs |= {"weight_mask": layer.structure, "weight_dense_shape": layer.dense_shape}
    QuantWeightBiasInputOutputLayer.__init__(layer, weight_quant, **kwargs)


# The float layer, and the Brevitas layer that it becomes in place.
_QUANT_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: qnn.QuantLinear,
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.Conv3d: qnn.QuantConv3d,
    CompactLinear: QuantCompactLinear,
}


class Brevitas(Scheme):
    """Brevitas layers with a `PIBiNNWeightQuantProxy`."""

    name = "brevitas"
    # Brevitas' constant buffers are in no state dict, and only loading consolidated checkpoints asks for them.
    loads_consolidated_shards = False

    @override
    def check(self, target: Target, place: Place) -> None:
        is_layer = isinstance(place.module, QuantWeightBiasInputOutputLayer) or type(place.module) in _QUANT_LAYERS
        if place.parameter_name != "weight" or not is_layer:
            known = ", ".join(layer.__name__ for layer in _QUANT_LAYERS)
            raise TargetError(
                f"{target}: Brevitas quantizes the weight of {known} and of its own layers, not {place.name!r} in a "
                f'{type(place.module).__name__}; use scheme="native" for anything else'
            )

    @override
    def attach(self, target: Target, place: Place, scale: GlobalScale) -> None:
        module: Any = place.module
        if float_type := _QUANT_LAYERS.get(type(module)):
            before = set(vars(module)) | set(module._modules)
            module.__class__ = float_type
            with real_device(module.weight.device):
                _add_quantizers(module, None)
            module.is_same_padded_strided = False  # of Brevitas' convolutions: padding "same" with a stride
            module.added_by_brevitas = (set(vars(module)) | set(module._modules)) - before
        dense_shape = target.shape if target.compact else None
        quantizer = PIBiNNWeightQuant.let(scaling_impl=scale, mask=target.structure, dense_shape=dense_shape)
        with real_device(module.weight.device):  # Brevitas' constants name no device
            module.weight_quant = PIBiNNWeightQuantProxy(module, quantizer)
        module.train(module.training)  # proxies are born in training mode

    @override
    def find(self, module: nn.Module) -> Iterator[tuple[str, Tensor, SignQuantizer]]:
        if isinstance(module, _ReadsAsW):
            quantizer = getattr(module.weight_quant, "sign_quantizer", None)
            if quantizer is not None:
                yield "weight", module.get_parameter("weight"), quantizer

    @override
    def release(self, place: Place) -> None:
        module: Any = place.module
        if isinstance(module, _ReadsAsW):
            stop_reading_as_w(module)
        if "added_by_brevitas" not in vars(module):  # a layer of Brevitas' own: its other quantizers stay
            tensor_quant = module.weight_quant.tensor_quant
            rule = tensor_quant.sign_quantizer
            tensor_quant.sign_quantizer = _Packed(rule.scale, rule.structure, rule.shape, rule.compact)
            return
        for name in (*vars(module)["added_by_brevitas"], "added_by_brevitas"):
            delattr(module, name)
        module.__class__ = next(own for own, quantized in _QUANT_LAYERS.items() if quantized is type(module))

    @override
    @contextmanager
    def traceable(self, model: nn.Module, args: tuple[Tensor, ...]) -> Iterator[None]:
        """Layers with activation quantizers pass tensors: ``torch.export`` cannot trace a ``QuantTensor``."""
        if not any(isinstance(module, QuantWeightBiasInputOutputLayer) for module in model.modules()):
            yield
            return
        with quant_inference_mode(model):
            model(*args)  # attaches the handlers
            yield


def _forgive_missing_scale(scale: Any, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A float checkpoint holds no λ; Brevitas loads it under ``IGNORE_MISSING_KEYS``."""
    if config.IGNORE_MISSING_KEYS:
        state_dict.setdefault(f"{prefix}value", scale.value)
