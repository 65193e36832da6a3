"""The scheme in torchao: a config for training, a config for packing, and the packed tensor subclass.

>>> from torchao.quantization import quantize_
>>> from torchao.quantization.qat import QATConfig
>>> from pibinn_plugin import BlockDiagonal
>>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
>>> quantize_(model, PIBiNNQATConfig(BlockDiagonal(4)))  # then train; one λ, registered in the first layer
>>> quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
>>> model[0].weight.packed_signs.bits.numel()
4

torchao shows a handler one layer at a time, never the model. So λ belongs to the config: all layers that one config
object meets share it, in one call of ``quantize_`` or in many, and several configs share one that is given to each as
``scale``. A config object is one network's: use a new one for the next. `pibinn_plugin.prepare` meets the whole model.

Modules are changed in place, never swapped: ``quantize_`` loses a module that is swapped for the root (ao#2640), and a
swap unties shared modules and makes optimizers stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from typing_extensions import override

from pibinn_plugin.errors import PIBiNNError, ScaleError, StructureError, TargetError
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale, SignQuantizer, initial_scale
from pibinn_plugin.schemes.base import Scheme
from pibinn_plugin.schemes.quiet_import import quiet_import
from pibinn_plugin.schemes.torchao_tensor import PackedTensorRule, PIBiNNTensor
from pibinn_plugin.schemes.weight_property import WeightReadsAsW, read_as_w, stop_reading_as_w
from pibinn_plugin.structure import Structure
from pibinn_plugin.targets import Target, make_target
from pibinn_plugin.weights import Place

with quiet_import():
    import torchao.core.config
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.qat import FakeQuantizedLinear
    from torchao.quantization.transform_module import register_quantize_module_handler


# --------------------------------------------------------------------------------------------------------- training


class _SharedScale:
    """λ of the layers that a config, or several with one scale, has met: the mean magnitude of their latents."""

    def __init__(self, scale: GlobalScale | None) -> None:
        self.scale, self.total, self.count = scale, 0.0, 0
        self.mean: Tensor | None = None  # what λ was set to at last

    def with_one_more(self, latent: Tensor) -> GlobalScale:
        """λ when the structural latents of one more layer join; that of a network in training is left alone."""
        if self.scale is None or (self.mean is not None and not torch.equal(self.mean, self.scale.value)):
            self.scale, self.total, self.count = GlobalScale(1.0, latent.device, latent.dtype), 0.0, 0
        if latent.device.type != "meta":
            self.total += initial_scale([latent]) * latent.numel()
            self.count += latent.numel()
            self.scale.set(self.total / self.count)
            self.mean = self.scale.value.detach().clone()
        return self.scale


# Of the scales that were given to configs: the mean goes over the layers of all of them.
_SHARED: WeakKeyDictionary[GlobalScale, _SharedScale] = WeakKeyDictionary()


class _StructureConfig(AOBaseConfig):
    """A config of a structure, kept as JSON text (torchao's encoder takes no tuples and no bytes), and of a λ."""

    version: int = 1

    def __init__(self, structure: Structure | str | None = None, scale: GlobalScale | None = None) -> None:
        super().__init__()
        if isinstance(structure, str):
            structure = Structure.from_json(structure)
        if not (structure is None or isinstance(structure, Structure)):
            raise StructureError(f"expected a Structure, its JSON text or None; got {structure!r}")
        if not (scale is None or isinstance(scale, GlobalScale)):
            raise ScaleError(f"expected a GlobalScale to share, or None; got {scale!r}")
        # Beside the property of the same name: this entry is what config_to_dict reads and config_from_dict gives back.
        self.__dict__["structure"] = None if structure is None else structure.to_json()
        self._shared = _SharedScale(None) if scale is None else _SHARED.setdefault(scale, _SharedScale(scale))

    def scale_with(self, latent: Tensor) -> GlobalScale:
        """λ of the layers that this config has met, when the structural latents of one more join."""
        return self._shared.with_one_more(latent)

    @property
    def structure(self) -> Structure | None:
        """Where the weights may be nonzero; None means `Dense`, or the structure the layer already has."""
        text = self.__dict__["structure"]
        return None if text is None else Structure.from_json(text)

    @override
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__["structure"] == other.__dict__["structure"]

    @override
    def __hash__(self) -> int:
        return hash((type(self), self.__dict__["structure"]))

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.structure})"


class PIBiNNQATConfig(_StructureConfig):
    """``quantize_(model, PIBiNNQATConfig(structure))``: train one-bit weights, with one λ for all layers it is used on.

    A config belongs to one network. torchao shows a handler one layer at a time, without its model: all layers that one
    config object meets, in one call or in several, share its λ, and the first of them registers it.

    Args:
        structure: where the weights may be nonzero, as a `Structure` or its JSON text; None means `Dense`, or the
            structure that a compact layer has.
        scale: the λ to use, where several configs share one; a new one unless given.

    Raises:
        StructureError: not a structure; or, in ``quantize_``, one that does not fit.
        TargetError: in ``quantize_``, a module this scheme cannot quantize.

    Example:
        >>> from pibinn_plugin import BlockDiagonal, global_scale
        >>> from torchao.quantization import FqnToConfig, quantize_
        >>> scale = GlobalScale()
        >>> blocks, dense = PIBiNNQATConfig(BlockDiagonal(4), scale), PIBiNNQATConfig(scale=scale)
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
        >>> quantize_(model, FqnToConfig({"0": blocks, "1": dense}), filter_fn=None)
        >>> global_scale(model) is scale
        True
    """


class PIBiNNFakeQuantizer(SignQuantizer):
    """A `SignQuantizer` where torchao expects a fake quantizer (``config``, ``enabled``)."""

    @property
    def config(self) -> PIBiNNQATConfig:
        """The config that this quantizer implements."""
        return PIBiNNQATConfig(self.structure)


class _FakeQuantized(WeightReadsAsW):
    """A layer in training, under torchao's names."""

    weight_fake_quantizer: PIBiNNFakeQuantizer
    bias: nn.Parameter | None

    @override
    def weight_of_latent(self, latent: Tensor) -> Tensor:
        return self.weight_fake_quantizer(latent)

    def stop(self) -> None:
        """Become the layer that this was, in place, with the latent as its weight."""
        del self.weight_fake_quantizer, self.activation_fake_quantizer
        stop_reading_as_w(self)


class _FakeQuantizedLinear(_FakeQuantized, FakeQuantizedLinear):
    """A linear layer in training; torchao's own tools see a ``FakeQuantizedLinear``."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        activation_quantizer: Any = self.activation_fake_quantizer
        if activation_quantizer is not None:
            x = activation_quantizer(x)
        return F.linear(x, self.weight, self.bias)

    @override
    def to_linear(self) -> nn.Linear:
        """Become the layer it was with the weight ``λ · sign(V) ⊙ M``, in place: also the root of a model can."""
        quantizer, weight = self.weight_fake_quantizer, self.weight.detach()
        self.stop()
        self._modules.pop("pibinn_scale", None)  # it would be left over in the state dict
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.pibinn_trained = (quantizer.structure, quantizer.scale)  # in a tuple: λ is no child of this layer
        return self


class TorchAO(Scheme):
    """Fake-quantized layers under torchao's names."""

    name = "torchao"

    @override
    def check(self, target: Target, place: Place) -> None:
        if place.parameter_name != "weight" or not isinstance(place.module, nn.Linear | _ConvNd | CompactLinear):
            raise TargetError(
                f"{target}: torchao quantizes the weight of linear, convolution and compact layers, not {place.name!r} "
                f'in a {type(place.module).__name__}; use scheme="native" for anything else'
            )

    @override
    def attach(self, target: Target, place: Place, scale: GlobalScale) -> None:
        module: Any = place.module
        quantizer = PIBiNNFakeQuantizer(scale, target.structure, target.shape, target.compact, module.weight.device)
        is_stock = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        read_as_w(module, _FakeQuantizedLinear if is_stock else _FakeQuantized)
        module.weight_fake_quantizer = quantizer.train(module.training)
        module.activation_fake_quantizer = None

    @override
    def find(self, module: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
        if isinstance(module, _FakeQuantized):
            yield "weight", module.get_parameter("weight"), module.weight_fake_quantizer
        for name, tensor in module._parameters.items():
            if isinstance(tensor, PIBiNNTensor):
                yield name, tensor.bits, PackedTensorRule(tensor)

    @override
    def release(self, place: Place) -> None:
        if isinstance(place.module, _FakeQuantized):
            place.module.stop()


@register_quantize_module_handler(PIBiNNQATConfig)
def _prepare(module: Any, config: PIBiNNQATConfig) -> nn.Module:
    if isinstance(module, _FakeQuantized):
        if config.structure not in (None, module.weight_fake_quantizer.structure):
            raise StructureError(
                f"the layer is prepared with {module.weight_fake_quantizer.structure}; it cannot be given "
                f"{config.structure}"
            )
        return module
    scheme, target = TorchAO(), _target(module, config.structure)
    scheme.check(target, target.places[0])
    scale = config.scale_with(target.structural_latent)
    scale.register_in(module)
    scheme.attach(target, target.places[0], scale)
    return module


def _target(module: nn.Module, structure: Structure | None) -> Target:
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise TargetError(f"a {type(module).__name__} has no parameter 'weight' to quantize")
    return make_target([Place("", module, "weight")], structure)


# ---------------------------------------------------------------------------------------------------------- packing


class PIBiNNWeightOnlyConfig(_StructureConfig):
    """``quantize_(model, PIBiNNWeightOnlyConfig(structure))``: pack weights to one bit for each structural nonzero.

    As the base config of ``QATConfig(..., step="convert")`` it packs what was trained, bit for bit. On a float model it
    is post-training quantization: λ is the mean of ``|V|`` over all layers that this config object packs.

    Args:
        structure: as for `PIBiNNQATConfig`; None takes the structure that the layer was trained with.
        scale: as for `PIBiNNQATConfig`, for layers that were not trained.

    Raises:
        StructureError: not a structure; or, in ``quantize_``, one that does not fit, or another than was trained.
        PIBiNNError: in ``quantize_``, a layer that was trained, and changed since.
    """


@register_quantize_module_handler(PIBiNNWeightOnlyConfig)
def _pack(module: Any, config: PIBiNNWeightOnlyConfig) -> nn.Module:
    if isinstance(getattr(module, "weight", None), PIBiNNTensor):
        return module
    if isinstance(module, CompactLinear | _FakeQuantized):
        raise PIBiNNError(f'a {type(module).__name__} is packed by pb.convert, or by QATConfig(..., step="convert")')
    trained_structure, trained_scale = vars(module).pop("pibinn_trained", (None, None))
    if trained_structure is not None and config.structure not in (None, trained_structure):
        raise StructureError(
            f"the layer was trained with {trained_structure}; it cannot be packed as {config.structure}"
        )
    target = _target(module, config.structure or trained_structure)
    weight = module.weight.detach()
    packed = PackedSigns.pack(weight, target.structure, target.shape)
    if trained_scale is None:
        scale = config.scale_with(target.structural_latent)
    else:
        scale = trained_scale
        scale.set(scale().item())  # positive in the parameter too, whose memory the packed tensors share
        if not torch.equal(packed.weight(scale().detach(), False, weight.dtype), weight):
            raise PIBiNNError("the layer was trained with one-bit weights, and its weight was changed since")
    tensor = PIBiNNTensor(
        packed.bits, scale.value.detach(), target.structure.to_json(), list(target.shape), weight.dtype
    )
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return module


# config_from_dict looks the names of configs up in these modules only (Hugging Face's TorchAoConfig uses it).
torchao.core.config.ALLOWED_AO_MODULES.add(__name__)
