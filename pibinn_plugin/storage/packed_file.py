"""`save` and `load`: a packed network in one safetensors file, readable by the stock library, never by pickle.

The tensors of the file: ``pibinn.signs`` (uint8, the packed signs of all weights, one after the other, each in whole
bytes), ``pibinn.scale`` (λ once, float32 or, where that is not exact, float64), ``pibinn.structures`` (uint8, the
stored forms of the distinct structures, one after the other, in order of first use), and every float parameter and
buffer under its own name, one that modules share under the first of its names. The metadata entry ``pibinn`` is JSON;
``docs/packed_file.md`` specifies it.

Versions 2 and 3 are read too: their weights have a tensor each, under their names, and they have no digest, no recipe
and no word on operators; version 2 has each shared tensor under all its names, and λ in float32.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor, nn

from pibinn_plugin.errors import ArtifactError, PIBiNNError, ScaleError
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.references import refuse_stale_methods
from pibinn_plugin.rollback import unchanged_on_error
from pibinn_plugin.storage.atomic_file import atomic_file
from pibinn_plugin.storage.header import FORMAT_VERSION, Header, checked_inputs, header_text, read_header
from pibinn_plugin.storage.inventory import FloatTensor, float_tensors, stored_scale
from pibinn_plugin.storage.layer_names import expand, ranges
from pibinn_plugin.storage.operator_probes import Probes, check_operators, probes_of
from pibinn_plugin.storage.recipe import Recipe, build, recipe_of
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

_SIGNS, _SCALE, _STRUCTURES = "pibinn.signs", "pibinn.scale", "pibinn.structures"


@dataclass(frozen=True)
class PackedNetwork:
    """What a packed file holds.

    Args:
        weights: the packed weights by name.
        scale: λ.
        float_tensors: by state-dict key.
        solver: how the network is built; None where that is not known.
        inputs: what the network takes in, as it was told to `save`.
        operators: projections of the operators that the network was trained with.
    """

    weights: dict[str, PackedSigns]
    scale: float
    float_tensors: dict[str, Tensor]
    solver: Recipe | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    operators: Probes = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> PackedNetwork:
        """Read a converted model (or one packed by torchao's own ``quantize_``).

        Raises:
            PIBiNNError: the model holds no packed weight, or still holds unpacked latents.
            ScaleError: its packed weights have several scales, or one that is not positive and finite.
            ArtifactError: a state that only pickle could store, a tensor that is not strided, or inputs that are no
                flat JSON object.
        """
        weights = packed_weights(model)
        if not weights or quantized_weights(model):
            raise PIBiNNError("expected a packed model: convert it first, pb.save(pb.convert(model), path)")
        scale = the_scale_value(weights)
        if not 0.0 < scale < float("inf"):
            raise ScaleError(f"the global scale is {scale}; a packed file holds a positive finite number")
        floats = {each.keys[0]: each.tensor.detach() for each in float_tensors(model)}
        root = uncompiled(model)
        return cls(
            weights={weight.name: weight.packed for weight in weights},
            scale=scale,
            float_tensors=floats,
            solver=recipe_of(root),
            inputs=checked_inputs(dict(inputs or {})),
            operators=probes_of(root),
        )


def save(model: nn.Module, path: str | Path, inputs: Mapping[str, Any] | None = None) -> Path:
    """Write a packed model to one safetensors file; what was at the path before stays until the new file is complete.

    Where the class of the model records its arguments, as the solvers of this project do, the file says how the model
    is built, and `load` needs nothing else; of operators it holds what is needed to tell another one.

    Args:
        model: what `convert` returned.
        path: of the file, conventionally ``*.safetensors``.
        inputs: what the network takes in, for whoever applies it: names with numbers or text, such as
            ``{"kind": "signal", "sampling_rate": 256.0, "unit": "µV"}``.

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
    network = PackedNetwork.of(model, inputs)
    entries = ranges({name: (packed.shape, packed.structure) for name, packed in network.weights.items()})
    order = [[network.weights[name] for name in expand(entry)] for entry in entries]
    structures = StoredStructures.of(weights[0].structure for weights in order)
    layers = [
        [entry, list(weights[0].shape), number, weights[0].nnz]
        for entry, weights, number in zip(entries, order, structures.numbers, strict=True)
    ]
    tensors = {
        _SIGNS: torch.cat([packed.bits.cpu() for weights in order for packed in weights]),
        _SCALE: stored_scale(network.scale),
        _STRUCTURES: structures.content,
    }
    if clash := network.float_tensors.keys() & tensors.keys():
        raise ArtifactError(f"the tensors {sorted(clash)} have names that the packed file uses itself; rename them")
    # Clones: safetensors refuses tensors that share memory, as views of one buffer do.
    tensors |= {key: tensor.clone().contiguous() for key, tensor in network.float_tensors.items()}
    fields = {"version": FORMAT_VERSION, "structures": structures.lengths, "layers": layers}
    said = {"solver": network.solver, "inputs": network.inputs, "operators": network.operators}
    header = header_text(fields | {name: value for name, value in said.items() if value}, tensors)
    try:
        content = serialized(tensors, metadata={"pibinn": header})
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"the model holds a tensor that a safetensors file cannot: {error}") from error
    with atomic_file(path) as partial:
        partial.write_bytes(content)
    return Path(path)


def load(path: str | Path, into: nn.Module | None = None, allow: Collection[str] = ()) -> nn.Module:
    """Load a packed file: into the solver that it describes, or into a model, in place, which then is packed.

    Every module stays the object that it was. Float parameters and buffers are written to; those on the meta device
    are exchanged for real ones.

    Args:
        path: of a file that `save` wrote.
        into: a float model, a prepared or a packed one, or one on the meta device, of the architecture that was saved.
            Without, the model is built as the file says, and given back in evaluation mode.
        allow: modules whose classes a file may name besides those of this project, such as ``["my_solvers"]``; they
            are imported. A class has to record its arguments, see `records_arguments`.

    Returns:
        The model.

    Raises:
        ArtifactError: the file is damaged or of an unknown version, does not belong to this model or to its operator,
            or does not say how its model is built, or by a class that is not allowed; the message names the field. The
            model is left as it was.
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
    if into is None:
        into = _built(path, network, allow)
    root = uncompiled(into)
    check_operators(root, network.operators)
    with unchanged_on_error(root):
        _pack_weights(root, network)
        refuse_stale_methods(root)
        refuse_save_pretrained(root)
        _load_float_tensors(root, network)
    return into


def _built(path: str | Path, network: PackedNetwork, allow: Collection[str]) -> nn.Module:
    if network.solver is None:
        raise ArtifactError(f"{path} does not say how its model is built: build it, and load(path, into=model)")
    model = build(network.solver, allow)
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"{path} describes a {type(model).__name__}, which is no network")
    return model.eval()


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
    header = read_header(path, metadata, tensors)
    scale = _read_scale(path, tensors.pop(_SCALE, None))
    if (content := tensors.pop(_STRUCTURES, None)) is None:
        raise ArtifactError(f"{path}: {_STRUCTURES!r} is missing")
    structures = StoredStructures(content, header.structures, [layer.structure for layer in header.layers])
    weights = _read_weights(path, header, structures, tensors)
    return PackedNetwork(weights, scale, tensors, header.solver, header.inputs, header.operators)


def _refuse_repeated_names(path: str | Path) -> None:
    """Of a name that a safetensors header holds twice, the library takes the last without a word."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=unique_members)


def _read_scale(path: str | Path, scale: Tensor | None) -> float:
    if scale is None or scale.dtype not in (torch.float32, torch.float64) or scale.shape != (1,):
        raise ArtifactError(f"{path}: {_SCALE!r} is missing or not one float32 or float64")
    if not 0.0 < (value := scale.item()) < float("inf"):
        raise ArtifactError(f"{path}: the global scale is {value}; expected a positive finite number")
    return value


def _read_weights(
    path: str | Path, header: Header, structures: StoredStructures, tensors: dict[str, Tensor]
) -> dict[str, PackedSigns]:
    try:
        decoded = structures.decode()
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    signs = _split_signs(path, header, tensors) if header.is_one_tensor else tensors
    weights = {}
    for layer, structure in zip(header.layers, decoded, strict=True):
        for name in layer.names:
            bits = signs.pop(name, None)
            if bits is None:
                raise ArtifactError(f"{path}: the packed weight {name!r} is missing")
            try:
                weights[name] = PackedSigns(bits, structure, layer.shape)
            except PIBiNNError as error:
                raise ArtifactError(f"{path}: the packed weight {name!r} is inconsistent: {error}") from error
            if layer.nnz not in (None, weights[name].nnz):
                raise ArtifactError(f"{path}: {name!r} has {weights[name].nnz} signs, and not the {layer.nnz} stated")
    return weights


def _split_signs(path: str | Path, header: Header, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The signs of each weight, from the one tensor that holds all of them, which is taken out."""
    signs = tensors.pop(_SIGNS, None)
    sizes = {name: -(-(layer.nnz or 0) // 8) for layer in header.layers for name in layer.names}
    if signs is None or signs.dtype != torch.uint8 or tuple(signs.shape) != (sum(sizes.values()),):
        raise ArtifactError(f"{path}: {_SIGNS!r} is missing, or not the {sum(sizes.values())} bytes of its layers")
    return dict(zip(sizes, signs.split(list(sizes.values())), strict=True))


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
