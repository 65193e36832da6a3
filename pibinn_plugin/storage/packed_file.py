"""`save` and `load`: a packed network in one safetensors file, readable by the stock library, never by pickle.

The tensors of the file: ``<weight>`` (uint8, the packed signs), ``pibinn.scale`` (λ once, float32 or, where that is
not exact, float64), ``pibinn.structures`` (uint8, the stored forms of the distinct structures, one after the other, in
order of first use), and every float parameter and buffer under its own name, one that modules share under the first of
its names. The metadata entry ``pibinn`` is JSON: ``version``, of the format; ``structures``, the bytes of each distinct
structure; ``layers``, for each packed weight its name, its dense shape and the number of its structure.

Version 2 is read too: it has each shared tensor under all its names, and λ in float32.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pibinn_plugin.errors import ArtifactError, PIBiNNError, ScaleError
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.references import refuse_stale_methods
from pibinn_plugin.rollback import unchanged_on_error
from pibinn_plugin.storage.atomic_file import atomic_file
from pibinn_plugin.storage.inventory import FloatTensor, float_tensors, stored_scale
from pibinn_plugin.storage.stored_structures import StoredStructures
from pibinn_plugin.structure.base import unique_members
from pibinn_plugin.targets import Target, make_target, parameter_places
from pibinn_plugin.weights import (
    OneBitWeight,
    global_scale,
    one_bit_weights,
    packed_weights,
    quantized_weights,
    register_scale,
    the_scale_value,
    uncompiled,
)
from pibinn_plugin.workflow import pack_in_place, put_bits, refuse_prepared, refuse_save_pretrained

FORMAT_VERSION = 3
_READABLE = (2, 3)
_SCALE, _STRUCTURES = "pibinn.scale", "pibinn.structures"


@dataclass(frozen=True)
class PackedNetwork:
    """What a packed file holds: the packed weights by name, λ, and the float tensors by state-dict key."""

    weights: dict[str, PackedSigns]
    scale: float
    float_tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> PackedNetwork:
        """Read a converted model (or one packed by torchao's own ``quantize_``).

        Raises:
            PIBiNNError: the model holds no packed weight, or still holds unpacked latents.
            ScaleError: its packed weights have several scales, or one that is not positive and finite.
            ArtifactError: a state that only pickle could store, or a tensor that is not strided.
        """
        weights = packed_weights(model)
        if not weights or quantized_weights(model):
            raise PIBiNNError("expected a packed model: convert it first, pb.save(pb.convert(model), path)")
        scale = the_scale_value(weights)
        if not 0.0 < scale < float("inf"):
            raise ScaleError(f"the global scale is {scale}; a packed file holds a positive finite number")
        floats = {each.keys[0]: each.tensor.detach() for each in float_tensors(model)}
        return cls({weight.name: weight.packed for weight in weights}, scale, floats)


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a packed model to one safetensors file; what was at the path before stays until the new file is complete.

    Args:
        model: what `convert` returned.
        path: of the file, conventionally ``*.safetensors``.

    Returns:
        The path.

    Raises:
        PIBiNNError: the model is not packed.
        ScaleError: λ is missing, doubled, not finite or not positive.
        ArtifactError: the model has a state that the file cannot hold.

    Example:
        >>> from pibinn_plugin import convert, prepare
        >>> packed = convert(prepare(nn.Linear(8, 8, bias=False), {"weight": None}))
        >>> save(packed, f"{tmp_path}/net.safetensors").stat().st_size < 512
        True
    """
    network = PackedNetwork.of(model)
    structures = StoredStructures.of(packed.structure for packed in network.weights.values())
    layers = [
        [name, list(packed.shape), number]
        for (name, packed), number in zip(network.weights.items(), structures.numbers, strict=True)
    ]
    tensors = {name: packed.bits for name, packed in network.weights.items()}
    tensors[_SCALE] = stored_scale(network.scale)
    tensors[_STRUCTURES] = structures.content
    if clash := network.float_tensors.keys() & tensors.keys():
        raise ArtifactError(f"the tensors {sorted(clash)} have names that the packed file uses itself; rename them")
    # Clones: safetensors refuses tensors that share memory, as views of one buffer do.
    tensors |= {key: tensor.clone().contiguous() for key, tensor in network.float_tensors.items()}
    fields = {"version": FORMAT_VERSION, "structures": structures.lengths, "layers": layers}
    header = json.dumps(fields, separators=(",", ":"))
    try:
        with atomic_file(path) as partial:
            save_file(tensors, partial, metadata={"pibinn": header})
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"the model holds a tensor that a safetensors file cannot: {error}") from error
    return Path(path)


def load(path: str | Path, into: nn.Module) -> nn.Module:
    """Load a packed file into a model, in place: afterwards the model is packed.

    Every module stays the object that it was. Float parameters and buffers are written to; those on the meta device
    are exchanged for real ones.

    Args:
        path: of a file that `save` wrote.
        into: a float model, a prepared or a packed one, or one on the meta device, of the architecture that was saved.

    Returns:
        The model.

    Raises:
        ArtifactError: the file is damaged or of an unknown version, or does not belong to this model; the message
            names the field. The model is left as it was.
        FileNotFoundError: there is no such file.

    Example:
        >>> from pibinn_plugin import convert, prepare
        >>> model = prepare(nn.Linear(8, 8), {"weight": None})
        >>> path = save(convert(model), f"{tmp_path}/net.safetensors")
        >>> loaded = load(path, into=nn.Linear(8, 8))
        >>> torch.equal(loaded.weight, model.weight)
        True
    """
    network = read(path)
    root = uncompiled(into)
    with unchanged_on_error(root):
        _pack_weights(root, network)
        refuse_stale_methods(root)
        refuse_save_pretrained(root)
        _load_float_tensors(root, network)
    return into


def read(path: str | Path) -> PackedNetwork:
    """Read and check a packed file. Raises `ArtifactError` as `load` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no packed file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get("pibinn")
            _refuse_repeated_names(path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata is None:
        raise ArtifactError(f"{path} has no metadata entry 'pibinn': it was not written by pibinn_plugin.save")
    lengths, layers = _read_header(path, metadata)
    scale = _read_scale(path, tensors.pop(_SCALE, None))
    if (content := tensors.pop(_STRUCTURES, None)) is None:
        raise ArtifactError(f"{path}: {_STRUCTURES!r} is missing")
    structures = StoredStructures(content, lengths, [number for _, _, number in layers])
    shapes = {name: shape for name, shape, _ in layers}
    return PackedNetwork(_read_weights(path, shapes, structures, tensors), scale, tensors)


def _refuse_repeated_names(path: str | Path) -> None:
    """Of a name that a safetensors header holds twice, the library takes the last without a word."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=unique_members)


def _read_header(path: str | Path, metadata: str) -> tuple[list[int], list[tuple[str, tuple[int, ...], int]]]:
    """Lengths of the structures and entries of the layers; `StoredStructures.decode` checks lengths and numbers."""
    try:
        header = json.loads(metadata, object_pairs_hook=unique_members)
        version = header["version"]
        if type(version) is not int or version not in _READABLE:
            raise ArtifactError(f"{path} has format version {version!r:.40}; this pibinn_plugin reads {_READABLE}")
        lengths, layers = header["structures"], header["layers"]
        checked = [(_checked_text(name), tuple(map(_checked_size, shape)), number) for name, shape, number in layers]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: the JSON metadata is malformed: {error!r}") from error
    if not checked or len({name for name, _, _ in checked}) != len(checked):
        raise ArtifactError(f"{path}: the metadata names no layer, or one twice")
    return lengths, checked


def _checked_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


def _checked_size(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**40:
        raise TypeError(f"{value!r} is not a size")
    return value


def _read_scale(path: str | Path, scale: Tensor | None) -> float:
    if scale is None or scale.dtype not in (torch.float32, torch.float64) or scale.shape != (1,):
        raise ArtifactError(f"{path}: {_SCALE!r} is missing or not one float32 or float64")
    if not 0.0 < (value := scale.item()) < float("inf"):
        raise ArtifactError(f"{path}: the global scale is {value}; expected a positive finite number")
    return value


def _read_weights(
    path: str | Path, shapes: dict[str, tuple[int, ...]], structures: StoredStructures, tensors: dict[str, Tensor]
) -> dict[str, PackedSigns]:
    try:
        decoded = structures.decode()
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    weights = {}
    for (name, shape), structure in zip(shapes.items(), decoded, strict=True):
        bits = tensors.pop(name, None)
        if bits is None:
            raise ArtifactError(f"{path}: the packed weight {name!r} is missing")
        try:
            weights[name] = PackedSigns(bits, structure, shape)
        except PIBiNNError as error:
            raise ArtifactError(f"{path}: the packed weight {name!r} is inconsistent: {error}") from error
    return weights


def _pack_weights(model: nn.Module, network: PackedNetwork) -> None:
    """Put the packed weights and λ into a model, prepared, packed or neither."""
    weights = one_bit_weights(model)
    if not weights:
        _pack_float_weights(model, network)
        return
    _check_weights(weights, network)
    scale = global_scale(model)
    device = _real_device(scale.value)
    # A new parameter and not a new value: an error further on leaves the old one as it was.
    scale.value = nn.Parameter(_exact_scale(network, scale.value.dtype, device), scale.value.requires_grad)
    for weight in weights:
        pack_in_place(weight, network.weights[weight.name].to(device), scale)


def _pack_float_weights(model: nn.Module, network: PackedNetwork) -> None:
    """Without quantizers in between: they hold masks of the dense shape, and a model may be too large for those."""
    refuse_prepared(model)
    places = {place.name: held for held in parameter_places(model).values() for place in held}
    try:
        if unknown := network.weights.keys() - places.keys():
            raise ArtifactError(f"the model has no {sorted(unknown)[:4]}")
        targets = [make_target(places[name], packed.structure) for name, packed in network.weights.items()]
    except PIBiNNError as error:
        raise ArtifactError(f"the file does not belong to this model: {error}") from error
    _check_weights(targets, network)
    first = targets[0].parameter
    device = _real_device(first)
    scale = GlobalScale(_exact_scale(network, first.dtype, device).item(), device, first.dtype)
    register_scale(model, targets[0].module, scale)
    for target in targets:
        packed = network.weights[target.name].to(device)
        put_bits(target.places, packed, scale, target.compact, target.parameter.dtype)


def _real_device(tensor: Tensor) -> torch.device:
    return tensor.device if tensor.device.type != "meta" else torch.device("cpu")


def _exact_scale(network: PackedNetwork, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = torch.tensor([network.scale], dtype=dtype, device=device)
    if value.item() != network.scale:
        raise ArtifactError(
            f"the file's global scale, {network.scale}, is no {dtype} number, and the weights would differ "
            f"from those that were saved: build the model in the dtype it was saved in"
        )
    return value


def _check_weights(weights: Sequence[OneBitWeight | Target], network: PackedNetwork) -> None:
    names = [weight.name for weight in weights]
    if sorted(names) != sorted(network.weights):
        raise ArtifactError(f"the file packs {sorted(network.weights)}, the model is prepared for {sorted(names)}")
    for weight in weights:
        packed = network.weights[weight.name]
        if (packed.structure, packed.shape) != (weight.structure, weight.shape):
            raise ArtifactError(
                f"{weight.name!r} is {packed.shape} with {packed.structure} in the file, {weight.shape} with "
                f"{weight.structure} in the model"
            )


@torch.no_grad()
def _load_float_tensors(model: nn.Module, network: PackedNetwork) -> None:
    """Write the float tensors of a file into a packed model; all checks come before the first value is written."""
    expected = float_tensors(model)
    stored = dict(network.float_tensors)
    pairs: list[tuple[FloatTensor, Tensor]] = []
    for own in expected:
        found = [(key, stored.pop(key)) for key in own.keys if key in stored]
        if not found:
            raise ArtifactError(f"the float tensors differ: the file lacks {own.keys[0]!r}")
        for key, tensor in found:
            _check_float_tensor(key, tensor, own.tensor)
            if not torch.equal(tensor, found[0][1]):
                raise ArtifactError(f"{key!r} and {found[0][0]!r} are one tensor in the model and differ in the file")
        pairs.append((own, found[0][1]))
    if stored:
        raise ArtifactError(f"the float tensors differ: the model has no {sorted(stored)[:8]}")
    stays_meta = {id(own.tensor) for own in expected}
    left = [
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.device.type == "meta" and id(tensor) not in stays_meta
    ]
    if left:
        raise ArtifactError(f"{left} are on the meta device and not in the file (non-persistent): build them first")
    for own, tensor in pairs:
        if own.tensor.device.type == "meta":
            _materialize(model, own, tensor)
        else:
            own.tensor.detach().copy_(tensor)


def _check_float_tensor(key: str, stored: Tensor, own: Tensor) -> None:
    if (stored.shape, stored.dtype) != (own.shape, own.dtype):
        raise ArtifactError(
            f"{key!r} is {stored.dtype} of shape {tuple(stored.shape)} in the file, {own.dtype} of shape "
            f"{tuple(own.shape)} in the model"
        )


def _materialize(model: nn.Module, own: FloatTensor, tensor: Tensor) -> None:
    """Put a real tensor where modules hold a meta one: one object for all of them, so that they stay tied."""
    is_parameter = isinstance(own.tensor, nn.Parameter)
    real = nn.Parameter(tensor, requires_grad=own.tensor.requires_grad) if is_parameter else tensor
    for module in model.modules():
        held_by: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in held_by:
            for name in [name for name, value in held.items() if value is own.tensor]:
                held[name] = real
