"""prepare -> freeze_signs -> convert: the life of a one-bit network, the same for all three schemes."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from pibinn_plugin.errors import PIBiNNError, ScaleError
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, CompactLinear, PackedConv, PackedLinear
from pibinn_plugin.packing import PackedSigns, UnpackSigns
from pibinn_plugin.quantizer import GlobalScale, SignQuantizer, initial_scale
from pibinn_plugin.targets import Target, Targets, resolve_targets

SCHEMES = ("native", "torchao", "brevitas")


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of a prepared model: its latent, the quantizer in front of it, and the module that holds both."""

    module_name: str
    module: nn.Module
    parameter_name: str
    latent: nn.Parameter
    quantizer: SignQuantizer
    scheme: str

    @property
    def name(self) -> str:
        """The name that the parameter had before ``prepare``."""
        return f"{self.module_name}.{self.parameter_name}" if self.module_name else self.parameter_name


def prepare(model: nn.Module, targets: Targets, scheme: str = "native") -> nn.Module:
    """Put a sign quantizer in front of each target weight and one λ at the root of the model, in place.

    λ starts at its least-squares value, the mean of ``|V|`` over the structural nonzeros of all targets.

    Args:
        model: any module. An optimizer made earlier is stale for ``scheme="brevitas"``, which rebuilds layers.
        targets: pattern of parameter names to structure, see `resolve_targets`.
        scheme: ``"native"`` (any parameter), ``"torchao"`` or ``"brevitas"`` (weights of linear, convolution and
            compact layers).

    Returns:
        The same model.

    Raises:
        TargetError: a target that does not exist, is shared, or cannot be swapped in this scheme.
        StructureError: a structure that does not fit.
        ScaleError: latents whose mean magnitude is zero or not finite.
        PIBiNNError: an unknown scheme, or a model that is prepared already.
        ModuleNotFoundError: the scheme's framework is not installed.

    Example:
        >>> from pibinn_plugin import BlockDiagonal
        >>> model = prepare(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), {"0.weight": BlockDiagonal(2)})
        >>> model[0].weight.count_nonzero().item()
        16
    """
    _refuse_prepared(model)  # before its targets: the latents of a prepared model have other names
    resolved = resolve_targets(model, targets)
    on_meta = any(target.parameter.device.type == "meta" for target in resolved)
    initial = 1.0 if on_meta else initial_scale(target.structural_latent for target in resolved)
    attach_quantizers(model, resolved, scheme, initial)
    return model


def attach_quantizers(model: nn.Module, targets: list[Target], scheme: str, scale_value: float) -> None:
    """Put the scheme's quantizers in front of resolved targets, and λ with the given value at the root, in place."""
    framework = _scheme_module(scheme)
    _refuse_prepared(model)
    for target in targets:  # all checks come before the first change: an error leaves the model as it was
        framework.check(model, target)
    first = targets[0].parameter
    scale = GlobalScale(scale_value, first.device, first.dtype)
    scale.is_registered = True  # it will be, below: after the scheme has swapped what it swaps
    for target in targets:
        framework.attach(model, target, scale)
    register_scale(model, model.get_submodule(targets[0].module_name), scale)


def _refuse_prepared(model: nn.Module) -> None:
    if any(isinstance(module, GlobalScale | SignQuantizer) for module in model.modules()):
        raise PIBiNNError("the model is prepared already; name all targets in one call")


def register_scale(root: nn.Module, first_module: nn.Module, scale: GlobalScale) -> None:
    """Give λ its one name and its one state-dict key: as a child of the root, ``pibinn_scale``.

    A container gives a meaning to each of its children (``nn.Sequential`` calls them); under such a root, λ is a child
    of the first module with a target.
    """
    is_container = isinstance(root, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    (first_module if is_container else root).add_module("pibinn_scale", scale)
    scale.is_registered = True


def quantized_weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """The one-bit weights of a prepared model, in the order of ``named_modules``."""
    for module_name, module in model.named_modules():
        for parameter_name, chain in getattr(module, "parametrizations", {}).items():
            if isinstance(chain[0], SignQuantizer):
                yield QuantizedWeight(module_name, module, parameter_name, chain.original, chain[0], "native")
        quantizer, scheme = getattr(module, "weight_fake_quantizer", None), "torchao"
        if quantizer is None:
            quantizer, scheme = getattr(getattr(module, "weight_quant", None), "sign_quantizer", None), "brevitas"
        if isinstance(quantizer, SignQuantizer) and isinstance(module.weight, nn.Parameter):
            yield QuantizedWeight(module_name, module, "weight", module.weight, quantizer, scheme)


def global_scale(model: nn.Module) -> GlobalScale:
    """The one λ of a prepared or packed model.

    Raises:
        ScaleError: there is none, there are several, or a layer uses one that the model does not own.

    Example:
        >>> model = prepare(nn.Linear(3, 2), {"weight": None})
        >>> global_scale(model) is model.pibinn_scale
        True
    """
    owned = {id(module): name for name, module in model.named_modules() if isinstance(module, GlobalScale)}
    if len(owned) != 1:
        found = f"{len(owned)} global scales ({', '.join(owned.values())})" if owned else "no global scale"
        raise ScaleError(f"the model has {found}; expected one: prepare the model as a whole, with one call")
    for weight in quantized_weights(model):
        if id(weight.quantizer.scale) not in owned:
            raise ScaleError(f"{weight.name!r} uses a global scale that the model does not own")
    return model.get_submodule(next(iter(owned.values())))  # type: ignore[return-value]


def freeze_signs(model: nn.Module) -> nn.Module:
    """Stage 2: stop training the latents, in place; λ and every float parameter go on.

    Pending gradients of the latents are dropped: an optimizer step would still move them.

    Raises:
        PIBiNNError: the model is not prepared.

    Example:
        >>> model = freeze_signs(prepare(nn.Linear(3, 2), {"weight": None}))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['bias', 'pibinn_scale.value']
    """
    weights = list(quantized_weights(model))
    if not weights:
        raise PIBiNNError("the model has no one-bit weights to freeze; prepare it first")
    for weight in weights:
        weight.latent.requires_grad_(False)
        weight.latent.grad = None
    return model


def convert(model: nn.Module) -> nn.Module:
    """A packed copy of a prepared model: one bit for each structural nonzero, one λ. The trained model stays as it was.

    Every weight is kept bit for bit; outputs differ by summation order only. Linear, convolution and compact layers
    become `PackedLinear` and `PackedConv`. The model may also be a part of a prepared one, such as the solver of a
    LightningModule: λ becomes its own. Where a module does more with its weight (raw parameters, Brevitas layers
    with activation quantizers, modules with hooks), the weight is unpacked in front of the unchanged module.

    Raises:
        PIBiNNError: the model is not prepared, its quantizers are not enabled (float warm-up), or it is sharded.
        ScaleError: λ is not finite.
        StructureError: a latent is NaN or infinite.

    Example:
        >>> packed = convert(prepare(nn.Linear(16, 4), {"weight": None}))
        >>> packed.bits.numel(), packed(torch.ones(16)).shape
        (8, torch.Size([4]))
    """
    weights = list(quantized_weights(model))
    if not weights:
        raise PIBiNNError("the model has no one-bit weights to convert; prepare and train it first")
    if not all(weight.quantizer.enabled for weight in weights):
        raise PIBiNNError("the model is in its float warm-up: its forward is not yet that of a one-bit network")
    # Asking the latents is not enough: after a forward without a backward, FSDP2's root holds whole parameters.
    is_sharded = any(hasattr(module, "unshard") for module in model.modules())
    if is_sharded or any(hasattr(weight.latent, "full_tensor") for weight in weights):
        raise PIBiNNError(
            "the model is sharded over ranks; load its checkpoint into an unsharded model and convert that"
        )
    scales = {id(weight.quantizer.scale) for weight in weights}
    if len(scales) > 1:
        raise ScaleError(f"the one-bit weights use {len(scales)} global scales; a network has one")
    packed_model = copy.deepcopy(model)
    copies = list(quantized_weights(packed_model))
    scale = copies[0].quantizer.scale
    if not any(module is scale for module in packed_model.modules()):
        register_scale(packed_model, copies[0].module, scale)  # a part of a prepared model becomes a model of its own
    scale.set(scale().item())
    for weight in copies:
        quantizer = weight.quantizer
        packed = PackedSigns.pack(weight.latent, quantizer.structure, quantizer.shape, quantizer.compact)
        packed_model = replace_with_packed(packed_model, weight, packed, scale)
    return packed_model


def replace_with_packed(
    model: nn.Module, weight: QuantizedWeight, packed: PackedSigns, scale: GlobalScale, keep_root: bool = False
) -> nn.Module:
    """Put packed signs where a quantized weight stood, in place.

    Returns the model: another module where the weight was the root's own and ``keep_root`` is not asked for.
    """
    layer = None if keep_root and not weight.module_name else _packed_layer(weight, packed, scale)
    if layer is None:
        _pack_in_place(weight, packed, scale)
        return model
    layer.train(weight.module.training)
    if scale in weight.module.children():
        layer.add_module("pibinn_scale", scale)
    if not weight.module_name:
        return layer
    model.set_submodule(weight.module_name, layer)
    return model


def _scheme_module(scheme: str) -> ModuleType:
    if scheme not in SCHEMES:
        raise PIBiNNError(f"unknown scheme {scheme!r}; expected one of {', '.join(SCHEMES)}")
    try:
        return importlib.import_module(f"pibinn_plugin.schemes.{scheme}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"scheme {scheme!r} needs {error.name}: pip install pibinn-plugin[{scheme}]"
        ) from error


def _packed_layer(weight: QuantizedWeight, packed: PackedSigns, scale: GlobalScale) -> nn.Module | None:
    """The packed layer in place of a module that does nothing but its linear map; None for any other module."""
    module: Any = weight.module
    if weight.parameter_name != "weight" or _has_more_than_a_linear_map(module):
        return None
    # A scheme's own class says which float layer it stands for; a parametrized class is a subclass of it.
    layer_type = getattr(module, "replaced_type", parametrize.type_before_parametrizations(module))
    if layer_type in (nn.Linear, CompactLinear, BlockDiagonalLinear, BandedLinear):
        return PackedLinear(packed, scale, module.bias, weight.quantizer.compact)
    if layer_type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return PackedConv(packed, scale, module)
    return None


def _has_more_than_a_linear_map(module: nn.Module) -> bool:
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return True
    return len(getattr(module, "parametrizations", {})) > 1


def _pack_in_place(weight: QuantizedWeight, packed: PackedSigns, scale: GlobalScale) -> None:
    """Replace the latent by its packed signs and unpack them in front of the module."""
    module, name, quantizer, dtype = weight.module, weight.parameter_name, weight.quantizer, weight.latent.dtype
    unpack = UnpackSigns(scale, quantizer.structure, quantizer.shape, quantizer.compact, dtype)
    if parametrize.is_parametrized(module, name):
        # Not remove_parametrizations: it edits the class, which a deepcopy shares with the model it was copied from.
        chain: Any = module.parametrizations[name]  # type: ignore[index]
        del chain.original
        chain.register_buffer("original", packed.bits)
        chain[0] = unpack
    else:
        delattr(module, name)
        module.register_buffer(name, packed.bits)
        # unsafe: bytes go in and floating-point weights come out.
        parametrize.register_parametrization(module, name, unpack, unsafe=True)
