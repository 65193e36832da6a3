"""prepare -> freeze_signs -> convert: the life of a one-bit network, the same for all schemes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pibinn_plugin.comparison import check_same_outputs
from pibinn_plugin.errors import PIBiNNError, ScaleError
from pibinn_plugin.packed import multiply_bits
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale, check_scale, initial_scale
from pibinn_plugin.references import copy_of, refuse_stale_methods
from pibinn_plugin.rollback import unchanged_on_error
from pibinn_plugin.schemes import release, scheme_of
from pibinn_plugin.schemes.base import Scheme
from pibinn_plugin.targets import Target, Targets, resolve_targets
from pibinn_plugin.unpack_signs import UnpackSigns, read_from_bits
from pibinn_plugin.weights import (
    OneBitWeight,
    Place,
    distinct,
    global_scale,
    one_bit_weights,
    quantized_weights,
    register_scale,
    the_scale_value,
    uncompiled,
)

__all__ = ["convert", "freeze_signs", "global_scale", "prepare", "quantized_weights"]


def prepare(model: nn.Module, targets: Targets, scheme: str = "native") -> nn.Module:
    """Put a sign quantizer in front of each target weight and one λ at the root of the model, in place.

    Every module stays the object that it was, and so does every parameter: optimizers, hooks, lists of layers and bound
    forwards go on. ``module.weight`` reads as ``λ · sign(V) ⊙ M`` from now on, wherever it is read. λ starts at its
    least-squares value, the mean of ``|V|`` over the structural nonzeros of all targets.

    Args:
        model: any module, also one that ``torch.compile`` returned.
        targets: pattern of parameter names to structure, see `resolve_targets`.
        scheme: ``"native"`` (any parameter), ``"torchao"`` or ``"brevitas"`` (weights of linear, convolution and
            compact layers).

    Returns:
        The same model.

    Raises:
        TargetError: a target that does not exist, or that cannot be quantized where it stands in this scheme.
        StructureError: a structure that does not fit.
        ScaleError: latents whose mean magnitude is zero or not finite.
        PIBiNNError: an unknown scheme, or a model that is prepared or packed already.
        ModuleNotFoundError: the scheme's framework is not installed.
            The model is as it was after any of these.

    Example:
        >>> from pibinn_plugin import BlockDiagonal
        >>> model = prepare(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), {"0.weight": BlockDiagonal(2)})
        >>> model[0].weight.count_nonzero().item()
        16
    """
    refuse_prepared(model)  # before its targets: the latents of a prepared model have other names
    resolved = resolve_targets(model, targets)
    on_meta = any(target.parameter.device.type == "meta" for target in resolved)
    initial = 1.0 if on_meta else initial_scale(target.structural_latent for target in resolved)
    _attach_quantizers(uncompiled(model), resolved, scheme_of(scheme), initial)
    return model


def _attach_quantizers(root: nn.Module, targets: Sequence[Target], framework: Scheme, scale_value: float) -> None:
    first = targets[0].parameter
    for target in targets:
        check_scale(scale_value, target.parameter.dtype)
        for place in distinct(target.places):
            framework.check(target, place)
    with unchanged_on_error(root):
        scale = GlobalScale(scale_value, first.device, first.dtype)
        register_scale(root, targets[0].module, scale)
        for target in targets:
            for place in distinct(target.places):
                framework.attach(target, place, scale)


def refuse_prepared(model: nn.Module) -> None:
    """Raise `PIBiNNError` where a model has one-bit weights or a global scale."""
    has_scale = any(isinstance(module, GlobalScale) for module in model.modules())
    if has_scale or one_bit_weights(model):
        raise PIBiNNError("the model is prepared already, or packed; name all targets in one call")


def freeze_signs(model: nn.Module) -> nn.Module:
    """Stage 2: keep the signs and stop training the latents, in place; λ and every float parameter go on.

    The signs are held apart from the latents from now on: whatever an optimizer, an average or anything else still
    writes to a latent, the weight stays. Pending gradients of the latents are dropped.

    Raises:
        PIBiNNError: the model is not prepared.
        StructureError: a latent is not finite; nothing is frozen then.

    Example:
        >>> model = freeze_signs(prepare(nn.Linear(3, 2), {"weight": None}))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['bias', 'pibinn_scale.value']
    """
    weights = quantized_weights(model)
    if not weights:
        raise PIBiNNError("the model has no one-bit weights to freeze; prepare it first")
    signs = [weight.packed for weight in weights]  # of all, before any is frozen
    for weight, kept in zip(weights, signs, strict=True):
        weight.freeze(kept)
        weight.latent.requires_grad_(False)
        weight.latent.grad = None
    return model


def convert(model: nn.Module, args: Sequence[Tensor] | None = None) -> nn.Module:
    """A packed copy of a prepared model: one bit for each structural nonzero, one λ. The trained model stays as it was.

    Every weight is kept bit for bit, and every module does with it what it did: ``module.weight`` is unpacked when it
    is read. Layers that are exactly stock linear or compact layers, with nothing attached, multiply their bits
    directly; their outputs differ by summation order only. The model may also be a part of a prepared one, such as the
    solver of a LightningModule: λ becomes its own.

    Args:
        model: what `prepare` returned, or a part of it.
        args: inputs of the network, to compare the packed network with the trained one on, both in evaluation mode.

    Raises:
        PIBiNNError: the model is not prepared, its quantizers are not enabled (float warm-up), it is sharded, or a part
            of it cannot be copied, such as a function that holds the original; or ``args`` is one tensor, or the
            outputs for them differ beyond rounding.
        ScaleError: λ is not finite, or the weights have several.
        StructureError: a latent is NaN or infinite.

    Example:
        >>> packed = convert(prepare(nn.Linear(16, 4), {"weight": None}), args=(torch.randn(3, 16),))
        >>> packed.bits.numel(), packed(torch.ones(16)).shape
        (8, torch.Size([4]))
    """
    root = uncompiled(model)
    check_convertible(root)
    if isinstance(args, Tensor):
        raise PIBiNNError("args are the inputs of the network: expected a tuple of tensors, such as (y,)")
    packed_model = copy_of(root)
    copies = quantized_weights(packed_model)
    scale: GlobalScale = copies[0].rule.scale
    if not any(module is scale for module in packed_model.modules()):
        scale = GlobalScale(scale().item(), scale.value.device, scale.value.dtype)  # a part becomes a model of its own
        register_scale(packed_model, copies[0].module, scale)
    scale.set(scale().item())
    for weight in copies:
        pack_in_place(weight, weight.packed, scale)
    refuse_save_pretrained(packed_model)
    refuse_stale_methods(packed_model)
    if args is not None:
        with evaluation(root), evaluation(packed_model), torch.no_grad():
            check_same_outputs(packed_model(*args), root(*args), "the packed network", "the trained one")
    return packed_model


def check_convertible(model: nn.Module) -> None:
    """Raise as `convert` does where a model cannot be packed."""
    weights = quantized_weights(model)
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
    if len({id(weight.rule.scale) for weight in weights}) > 1:
        the_scale_value(weights)
        raise ScaleError("the one-bit weights use several global scales of one value; a network has one")


def pack_in_place(weight: OneBitWeight, packed: PackedSigns, scale: GlobalScale) -> None:
    """Put packed signs where a one-bit weight stands, in all its places."""
    dtype = weight.dtype
    for place in distinct(weight.places):
        release(weight.scheme, place)
    put_bits(weight.places, packed, scale, weight.compact, dtype)


def put_bits(
    places: Sequence[Place], packed: PackedSigns, scale: GlobalScale, compact: bool, dtype: torch.dtype
) -> None:
    """Put packed signs where a parameter stands that no scheme holds."""
    for place in distinct(places):
        unpack = UnpackSigns(scale, packed, compact, dtype)
        read_from_bits(place.module, place.parameter_name, unpack, packed.bits)
        multiply_bits(place.module)


def refuse_save_pretrained(model: nn.Module) -> None:
    """Let a packed Hugging Face model say how it is saved: its own way would load as a network of random weights."""
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained = _save_pretrained  # type: ignore[assignment]


def _save_pretrained(*args: object, **kwargs: object) -> None:
    raise PIBiNNError(
        "a packed model is saved with pb.save(model, path) and its config with model.config.save_pretrained(folder); "
        "load it with pb.load(path, into=Model(Config.from_pretrained(folder)))"
    )


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Every module of a model in evaluation mode, and afterwards in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
