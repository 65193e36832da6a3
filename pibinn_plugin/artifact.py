"""`save` and `load`: a packed network in one safetensors file, readable by the stock library, never by pickle.

The tensors of the file: ``<weight>`` (uint8, the packed signs), ``pibinn.scale`` (float32, λ once),
``pibinn.structures`` (uint8, the stored forms of the distinct structures, one after the other, in order of first use),
and every float parameter and buffer under its own name. The metadata entry ``pibinn`` is JSON: ``version``, of the
format; ``structures``, the bytes of each distinct structure; ``layers``, for each packed weight its name, its dense
shape and the number of its structure.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pibinn_plugin.errors import ArtifactError, PIBiNNError, ScaleError
from pibinn_plugin.inventory import float_tensors
from pibinn_plugin.packing import PackedSigns, packed_signs_of
from pibinn_plugin.stored_structures import StoredStructures
from pibinn_plugin.targets import resolve_targets
from pibinn_plugin.workflow import (
    QuantizedWeight,
    attach_quantizers,
    global_scale,
    quantized_weights,
    replace_with_packed,
)

FORMAT_VERSION = 2
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
            ScaleError: its packed weights have several scales.
            ArtifactError: a state that only pickle could store.
        """
        weights = dict(packed_signs_of(model))
        if not weights or any(True for _ in quantized_weights(model)):
            raise PIBiNNError("expected a packed model: convert it first, pb.save(pb.convert(model), path)")
        scale = _scale_value(model)
        if not 0.0 < torch.tensor(scale, dtype=torch.float32).item() < float("inf"):
            raise ScaleError(f"the global scale is {scale}; a packed file holds a positive float32")
        return cls(weights, scale, float_tensors(model))


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a packed model to one safetensors file; what was at the path before stays until the new file is complete.

    λ is stored as float32: exact for models in float32, bfloat16 and float16, rounded for a model in float64.

    Args:
        model: what `convert` returned.
        path: of the file, conventionally ``*.safetensors``.

    Returns:
        The path.

    Raises:
        PIBiNNError: the model is not packed.
        ScaleError: λ is missing, doubled, not finite or not positive.

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
    tensors[_SCALE] = torch.tensor([network.scale], dtype=torch.float32)
    tensors[_STRUCTURES] = structures.content
    # Clones: safetensors refuses tensors that share memory, as tied float parameters do.
    tensors |= {key: tensor.detach().clone().contiguous() for key, tensor in network.float_tensors.items()}
    fields = {"version": FORMAT_VERSION, "structures": structures.lengths, "layers": layers}
    header = json.dumps(fields, separators=(",", ":"))
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata={"pibinn": header})
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def load(path: str | Path, into: nn.Module) -> nn.Module:
    """Load a packed file into a model, in place: afterwards the model is packed.

    Args:
        path: of a file that `save` wrote.
        into: a float model, a prepared one, or one on the meta device, of the architecture that was saved.

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
    _load_into(copy.deepcopy(into), network)  # a dry run: whatever is wrong is raised before the model is touched
    return _load_into(into, network)


def read(path: str | Path) -> PackedNetwork:
    """Read and check a packed file. Raises `ArtifactError` as `load` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no packed file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get("pibinn")
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


def _read_header(path: str | Path, metadata: str) -> tuple[list[int], list[tuple[str, tuple[int, ...], int]]]:
    """Lengths of the structures and entries of the layers; `StoredStructures.decode` checks lengths and numbers."""
    try:
        header = json.loads(metadata)
        if (version := header["version"]) != FORMAT_VERSION:
            raise ArtifactError(f"{path} has format version {version}; this pibinn_plugin reads {FORMAT_VERSION}")
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
    if scale is None or scale.dtype != torch.float32 or scale.shape != (1,):
        raise ArtifactError(f"{path}: {_SCALE!r} is missing or not one float32")
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


def _load_into(model: nn.Module, network: PackedNetwork) -> nn.Module:
    prepared = {weight.name: weight for weight in quantized_weights(model)}
    if not prepared:
        try:
            targets = resolve_targets(model, {name: packed.structure for name, packed in network.weights.items()})
            attach_quantizers(model, targets, "native", network.scale)
        except PIBiNNError as error:
            raise ArtifactError(f"the file does not belong to this model: {error}") from error
        prepared = {weight.name: weight for weight in quantized_weights(model)}
    _check_weights(prepared, network)
    scale = global_scale(model)
    device = scale.value.device if scale.value.device.type != "meta" else torch.device("cpu")
    scale.value = nn.Parameter(torch.tensor([network.scale], dtype=scale.value.dtype, device=device))
    for name, weight in prepared.items():
        packed = network.weights[name]
        on_device = PackedSigns(packed.bits.to(device), packed.structure, packed.shape)
        replace_with_packed(model, weight, on_device, scale, keep_root=True)
    _load_float_tensors(model, network, device)
    return model


def _check_weights(prepared: dict[str, QuantizedWeight], network: PackedNetwork) -> None:
    if prepared.keys() != network.weights.keys():
        raise ArtifactError(f"the file packs {sorted(network.weights)}, the model is prepared for {sorted(prepared)}")
    for name, weight in prepared.items():
        packed, quantizer = network.weights[name], weight.quantizer
        if (packed.structure, packed.shape) != (quantizer.structure, quantizer.shape):
            raise ArtifactError(
                f"{name!r} is {packed.shape} with {packed.structure} in the file, {quantizer.shape} with "
                f"{quantizer.structure} in the model"
            )


def _load_float_tensors(model: nn.Module, network: PackedNetwork, device: torch.device) -> None:
    expected = float_tensors(model)
    if expected.keys() != network.float_tensors.keys():
        missing, unknown = (
            expected.keys() - network.float_tensors.keys(),
            network.float_tensors.keys() - expected.keys(),
        )
        raise ArtifactError(
            f"the float tensors differ: the file lacks {sorted(missing)}, the model has no {sorted(unknown)}"
        )
    for key, tensor in network.float_tensors.items():
        if (tensor.shape, tensor.dtype) != (expected[key].shape, expected[key].dtype):
            raise ArtifactError(
                f"{key!r} is {tensor.dtype} of shape {tuple(tensor.shape)} in the file, {expected[key].dtype} of shape "
                f"{tuple(expected[key].shape)} in the model"
            )
    model.load_state_dict(_assignable(model, network, device), strict=False, assign=True)
    left = [
        name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.device.type == "meta"
    ]
    if left:
        raise ArtifactError(f"{left} are on the meta device and not in the file (non-persistent): build them first")


def _assignable(model: nn.Module, network: PackedNetwork, device: torch.device) -> dict[str, Tensor]:
    """The float tensors as objects to assign: one object for the keys that the model ties, so that they stay tied."""
    state: dict[str, Tensor] = {}
    tied: dict[int, str] = {}
    own_tensors = model.state_dict(keep_vars=True)
    for key, tensor in network.float_tensors.items():
        own = own_tensors[key]
        if (first := tied.setdefault(id(own), key)) != key:
            if not torch.equal(tensor, network.float_tensors[first]):
                raise ArtifactError(f"{key!r} and {first!r} are one tensor in the model and differ in the file")
            state[key] = state[first]
            continue
        on_device = tensor.to(device)
        is_parameter = isinstance(own, nn.Parameter)
        state[key] = nn.Parameter(on_device, requires_grad=own.requires_grad) if is_parameter else on_device
    return state


def _scale_value(model: nn.Module) -> float:
    """λ of a packed model: of its `GlobalScale`, or the one that its packed tensors agree on."""
    parameters: list[Any] = list(model.parameters())
    in_tensors = {parameter.scale.item() for parameter in parameters if hasattr(parameter, "packed_signs")}
    if not in_tensors:
        return float(global_scale(model)().item())
    if len(in_tensors) > 1:
        raise ScaleError(f"the packed weights have {len(in_tensors)} scales ({sorted(in_tensors)}); expected one")
    return float(in_tensors.pop())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
