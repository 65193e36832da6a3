"""The scheme in torchao: a config for training, a config for packing, and the packed tensor subclass.

>>> from torchao.quantization import quantize_
>>> from torchao.quantization.qat import QATConfig
>>> from pibinn_plugin import BlockDiagonal
>>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
>>> quantize_(model, PIBiNNQATConfig(BlockDiagonal(4)))  # then train; one λ, registered at the root of the model
>>> quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
>>> model[0].weight.packed_signs.bits.numel()
4

Modules are changed in place, never swapped: ``quantize_`` loses a module that is swapped for the root (ao#2640), and a
swap unties shared modules and makes optimizers stale.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from typing_extensions import override

from pibinn_plugin import native_kernel
from pibinn_plugin.errors import PIBiNNError, ScaleError, StructureError, TargetError
from pibinn_plugin.functional import packed_linear
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, CompactLinear, compact_linear
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale, SignQuantizer, initial_scale
from pibinn_plugin.schemes.quiet_import import quiet_import
from pibinn_plugin.structure import Dense, Structure
from pibinn_plugin.targets import Target, check_own_forward, check_readers
from pibinn_plugin.workflow import quantized_weights, register_scale

with quiet_import():
    import torchao.core.config
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear
    from torchao.quantization.transform_module import register_quantize_module_handler
    from torchao.utils import TorchAOBaseTensor

aten = torch.ops.aten


# --------------------------------------------------------------------------------------------------------- training


class _StructureConfig(AOBaseConfig):
    """A config with one field, the structure, kept as JSON text: torchao's encoder takes no tuples and no bytes."""

    version: int = 1

    def __init__(self, structure: Structure | str | None = None) -> None:
        super().__init__()
        if isinstance(structure, str):
            structure = Structure.from_json(structure)
        if not (structure is None or isinstance(structure, Structure)):
            raise StructureError(f"expected a Structure, its JSON text or None; got {structure!r}")
        # Beside the property of the same name: this entry is what config_to_dict reads and config_from_dict gives back.
        self.__dict__["structure"] = None if structure is None else structure.to_json()

    @property
    def structure(self) -> Structure | None:
        """Where the weights may be nonzero; None means `Dense`, or the structure the layer already has."""
        text = self.__dict__["structure"]
        return None if text is None else Structure.from_json(text)

    @override
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    @override
    def __hash__(self) -> int:
        return hash((type(self), self.__dict__["structure"]))

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.structure})"


class PIBiNNQATConfig(_StructureConfig):
    """``quantize_(model, PIBiNNQATConfig(structure))``: train one-bit weights, with one λ for the whole model.

    Args:
        structure: where the weights may be nonzero, as a `Structure` or its JSON text; None means `Dense`, or the
            structure that a compact layer has.

    Raises:
        StructureError: not a structure; or, in ``quantize_``, one that does not fit.
        TargetError: in ``quantize_``, a module this scheme cannot quantize.
    """


class PIBiNNFakeQuantizer(SignQuantizer):
    """A `SignQuantizer` where torchao expects a fake quantizer (``config``, ``enabled``)."""

    @property
    def config(self) -> PIBiNNQATConfig:
        """The config that this quantizer implements."""
        return PIBiNNQATConfig(self.structure)


class PIBiNNFakeQuantizedLinear(FakeQuantizedLinear):
    """A linear layer in training; torchao's own tools see a ``FakeQuantizedLinear``."""

    replaced_type: ClassVar[type[nn.Module]] = nn.Linear

    @override
    def to_linear(self) -> nn.Linear:
        """Become a plain linear layer with the weight ``λ · sign(V) ⊙ M``, in place: also the root of a model can."""
        quantizer, latent = self.weight_fake_quantizer, self.get_parameter("weight")
        weight = quantizer(latent).detach()
        del self.weight_fake_quantizer, self.activation_fake_quantizer
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.pibinn_structure = quantizer.structure  # a weight-only config without a structure reads it
        return self


class _FakeQuantizedConv:
    replaced_type: ClassVar[type[nn.Module]]

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_fake_quantizer(self.weight), self.bias)  # type: ignore[attr-defined]


class PIBiNNFakeQuantizedConv1d(_FakeQuantizedConv, nn.Conv1d):
    """A one-dimensional convolution in training."""

    replaced_type = nn.Conv1d


class PIBiNNFakeQuantizedConv2d(_FakeQuantizedConv, nn.Conv2d):
    """A two-dimensional convolution in training."""

    replaced_type = nn.Conv2d


class PIBiNNFakeQuantizedConv3d(_FakeQuantizedConv, nn.Conv3d):
    """A three-dimensional convolution in training."""

    replaced_type = nn.Conv3d


class _FakeQuantizedCompact:
    replaced_type: ClassVar[type[nn.Module]]

    def forward(self: Any, input: Tensor) -> Tensor:
        weight = self.weight_fake_quantizer(self.weight)
        return compact_linear(input, weight, self.structure, self.dense_shape, self.bias)


class PIBiNNFakeQuantizedBlockDiagonalLinear(_FakeQuantizedCompact, BlockDiagonalLinear):
    """A compact block-diagonal layer in training."""

    replaced_type = BlockDiagonalLinear


class PIBiNNFakeQuantizedBandedLinear(_FakeQuantizedCompact, BandedLinear):
    """A compact banded layer in training."""

    replaced_type = BandedLinear


_FAKE_QUANTIZED: dict[type[nn.Module], Any] = {
    fake_quantized.replaced_type: fake_quantized
    for fake_quantized in (
        PIBiNNFakeQuantizedLinear,
        PIBiNNFakeQuantizedConv1d,
        PIBiNNFakeQuantizedConv2d,
        PIBiNNFakeQuantizedConv3d,
        PIBiNNFakeQuantizedBlockDiagonalLinear,
        PIBiNNFakeQuantizedBandedLinear,
    )
}


def check(root: nn.Module, target: Target) -> None:
    """Raise `TargetError` unless the target is the weight of a layer that this scheme knows, exactly."""
    # Exactly: a subclass may read its weight elsewhere than in the forward we would replace (attention does).
    if target.parameter_name != "weight" or type(target.module) not in _FAKE_QUANTIZED:
        known = ", ".join(layer.__name__ for layer in _FAKE_QUANTIZED)
        raise TargetError(f'{target}: torchao quantizes the weight of {known}; use scheme="native" for anything else')
    check_own_forward(target)
    check_readers(root, target)


def attach(root: nn.Module, target: Target, scale: GlobalScale) -> None:
    """Turn the target's module into its fake-quantized class, in place."""
    module: Any = target.module
    quantizer = PIBiNNFakeQuantizer(scale, target.structure, target.shape, target.compact, module.weight.device)
    module.__class__ = _FAKE_QUANTIZED[type(module)]
    module.weight_fake_quantizer = quantizer
    module.activation_fake_quantizer = None


@register_quantize_module_handler(PIBiNNQATConfig)
def _prepare(module: Any, config: PIBiNNQATConfig) -> nn.Module:
    if isinstance(getattr(module, "weight_fake_quantizer", None), SignQuantizer):
        return module
    root = _root_of_quantize_call(module)
    target = _target(module, config.structure)
    check(root, target)
    scale = next((child for child in root.modules() if isinstance(child, GlobalScale)), None)
    if scale is None:
        scale = GlobalScale(1.0, module.weight.device, module.weight.dtype)
        register_scale(root, module, scale)
    attach(root, target, scale)
    if module.weight.device.type != "meta":
        # The handler meets one layer at a time: λ is the least-squares value of those met so far, at last of all.
        latents = (weight.quantizer.structural(weight.latent) for weight in quantized_weights(root))
        scale.set(initial_scale(latents))
    return module


def _target(module: nn.Module, structure: Structure | None) -> Target:
    if isinstance(module, CompactLinear):
        if structure not in (None, module.structure):
            raise StructureError(f"the layer is stored as {module.structure}; it cannot be given {structure}")
        return Target("", module, "weight", module.structure, module.dense_shape, True)
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise TargetError(f"a {type(module).__name__} has no parameter 'weight' to quantize")
    shape = tuple(module.get_parameter("weight").shape)
    target = Target("", module, "weight", structure or Dense(), shape, False)
    target.structure.check(target.shape)
    return target


def _root_of_quantize_call(module: nn.Module) -> nn.Module:
    """The model given to the ``quantize_`` call that we are inside of; the module itself where there is none.

    torchao hands a handler one module, without its name or root, and one λ must be shared by all layers of a model,
    also over the several configs of an ``FqnToConfig``, and never by two models that the same config is used on. What
    tells the models apart is on the call stack only.
    """
    root = module
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code is quantize_.__code__:
            root = frame.f_locals["model"]  # the outermost call wins
    return root


# ---------------------------------------------------------------------------------------------------------- packing


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
        native_kernel.layout_of(_structure(structure), tuple(dense_shape))

    @property
    def packed_signs(self) -> PackedSigns:
        """The signs, as every scheme stores them. Raises `StructureError` where bits, structure and shape disagree."""
        return PackedSigns(self.bits, _structure(self.structure), tuple(self.dense_shape))

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``λ · S ⊙ M``, in this tensor's dtype or another."""
        return self.packed_signs.weight(self.scale, False, output_dtype or self.dtype)


torch.serialization.add_safe_globals([PIBiNNTensor])


@PIBiNNTensor.implements(aten.linear.default)
@PIBiNNTensor.implements_torch_function(F.linear)
def _linear(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    input, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    structure = _structure(weight.structure)
    return packed_linear(input, weight.bits, weight.scale, structure, tuple(weight.dense_shape), bias)


@PIBiNNTensor.implements(aten.convolution.default)
@PIBiNNTensor.implements_torch_function([F.conv1d, F.conv2d, F.conv3d])
def _convolution(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return func(args[0], args[1].dequantize(), *args[2:], **kwargs)


@PIBiNNTensor.implements(aten._to_copy.default)
def _to_copy(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    # torchao's own implementation drops the dtype.
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **kwargs)
    bits, scale = self.bits.to(to["device"]), self.scale.to(to["device"], to["dtype"])
    copy = PIBiNNTensor(bits, scale, self.structure, self.dense_shape, to["dtype"])
    return return_and_correct_aliasing(func, args, kwargs, copy)


class PIBiNNWeightOnlyConfig(_StructureConfig):
    """``quantize_(model, PIBiNNWeightOnlyConfig(structure))``: pack weights to one bit for each structural nonzero.

    As the base config of ``QATConfig(..., step="convert")`` it packs what was trained, bit for bit. On a float model it
    is post-training quantization: λ is the mean of ``|V|`` over all layers that the call packs.

    Args:
        structure: as for `PIBiNNQATConfig`; None takes the structure that the layer was trained with.

    Raises:
        StructureError: not a structure; or, in ``quantize_``, one that does not fit, or another than was trained.
        ScaleError: in ``quantize_``, the layer would change the λ of layers that were trained and packed before.
    """


@register_quantize_module_handler(PIBiNNWeightOnlyConfig)
def _pack(module: Any, config: PIBiNNWeightOnlyConfig) -> nn.Module:
    if hasattr(getattr(module, "weight", None), "packed_signs"):
        return module
    if isinstance(module, CompactLinear) or isinstance(getattr(module, "weight_fake_quantizer", None), SignQuantizer):
        raise PIBiNNError(f'a {type(module).__name__} is packed by pb.convert, or by QATConfig(..., step="convert")')
    trained_structure = getattr(module, "pibinn_structure", None)
    if trained_structure is not None and config.structure not in (None, trained_structure):
        raise StructureError(
            f"the layer was trained with {trained_structure}; it cannot be packed as {config.structure}"
        )
    target = _target(module, config.structure or trained_structure)
    weight = module.weight.detach()
    packed = PackedSigns.pack(weight, target.structure, target.shape)
    magnitudes, is_trained = target.structure.to_compact(weight).abs(), trained_structure is not None
    scale = _shared_scale(_root_of_quantize_call(module), magnitudes, is_trained)
    module.pibinn_is_post_training = not is_trained
    tensor = PIBiNNTensor(packed.bits, scale, target.structure.to_json(), list(target.shape), weight.dtype)
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return module


def _shared_scale(root: nn.Module, magnitudes: Tensor, is_trained: bool) -> Tensor:
    """λ of all packed weights of the model: that of training, or the running mean of the magnitudes of the latents."""
    mean = initial_scale([magnitudes])
    modules: list[Any] = [m for m in root.modules() if isinstance(getattr(m, "weight", None), PIBiNNTensor)]
    if not modules:
        return magnitudes.new_full((1,), mean)
    scale = modules[0].weight.scale
    if is_trained or not all(getattr(module, "pibinn_is_post_training", False) for module in modules):
        if scale.item() != magnitudes.new_tensor(mean).item():
            raise ScaleError(
                f"the model holds packed weights with λ = {scale.item():.6g}, this layer has λ = {mean:.6g}: a network "
                f"has one; prepare and train its layers together"
            )
        return scale
    count = sum(module.weight.packed_signs.nnz for module in modules)
    new = scale + (mean - scale) * (magnitudes.numel() / (count + magnitudes.numel()))
    for module in modules:  # each: after a deepcopy they are no longer one tensor
        module.weight.scale.copy_(new)
    return scale


# config_from_dict looks the names of configs up in these modules only (Hugging Face's TorchAoConfig uses it).
torchao.core.config.ALLOWED_AO_MODULES.add(__name__)
