"""The packed file of a baseline: what its row of a comparison takes on disk, and the network read back from it.

One safetensors file in the layout of `pibinn_plugin.storage.packed_file`, with as short a header: the codes of all
weights in one tensor, their scales in another, the distinct structures in a third, every float parameter under its own
name; names in ranges where weights are alike. Signs take one bit, ternary codes 1.6 (five to a byte, base 3) or 2,
``int8`` weights 8 and ``fp16`` ones 16. A ``zero_bit`` file has no weights, only the structure of those that are
masked: the weights are those that the constructor of the solver makes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.compare.baselines import baseline_weights
from lightning_modules.compare.callback import BASELINES
from lightning_modules.compare.dense_twin import densify_weight
from pibinn_plugin.bits import pack_bits, unpack_bits
from pibinn_plugin.errors import ArtifactError, PIBiNNError
from pibinn_plugin.storage.atomic_file import atomic_file
from pibinn_plugin.storage.layer_names import expand, ranges
from pibinn_plugin.storage.stored_structures import StoredStructures
from pibinn_plugin.structure import Structure
from pibinn_plugin.targets import resolve_targets

__all__ = ["StoredSize", "load_baseline", "pack_trits", "save_baseline", "stored_size", "unpack_trits"]

_CODES, _SCALES, _STRUCTURES = "baseline.codes", "baseline.scales", "baseline.structures"
_DTYPES = {8: torch.int8, 16: torch.float16}  # by the bits of a code
_TRITS_A_BYTE = {3: 5, 4: 4}  # by base: 243 of 256 values used, or two bits each


def pack_trits(codes: Tensor, base: int = 3) -> Tensor:
    """Pack codes -1, 0, 1 into bytes, the first code in the lowest digit.

    Args:
        codes: shape ``(count,)``.
        base: 3 for five codes to a byte (1.6 bits each), 4 for four (2 bits each).

    Returns:
        uint8, shape ``(ceil(count / codes a byte),)``.

    Example:
        >>> pack_trits(torch.tensor([1, 0, -1, 1, 1, -1]))
        tensor([221,   0], dtype=torch.uint8)
    """
    digits = nn.functional.pad((codes + 1).to(torch.uint8), (0, -codes.numel() % _TRITS_A_BYTE[base]))
    return (digits.unflatten(0, (-1, _TRITS_A_BYTE[base])) * _powers(base)).sum(-1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, count: int, base: int = 3) -> Tensor:
    """Invert `pack_trits`; int8, shape ``(count,)``.

    Example:
        >>> unpack_trits(torch.tensor([221, 0], dtype=torch.uint8), 6)
        tensor([ 1,  0, -1,  1,  1, -1], dtype=torch.int8)
    """
    return (packed.unsqueeze(-1) // _powers(base) % base).flatten()[:count].to(torch.int8) - 1


def _powers(base: int) -> Tensor:
    return torch.tensor([base**digit for digit in range(_TRITS_A_BYTE[base])], dtype=torch.uint8)


@torch.no_grad()
def save_baseline(model: nn.Module, quantizer: str, path: str | Path, trit_base: int = 3) -> Path:
    """Write a trained baseline to one file; what was at the path before stays until the new file is complete.

    Args:
        model: a solver with the weights of `lightning_modules.compare.callback.attach_baseline`.
        quantizer: with which they were attached.
        path: of the file.
        trit_base: how ternary codes are packed, see `pack_trits`.

    Returns:
        The path.

    Raises:
        ArtifactError: a weight that is not finite.
    """
    tensors, codes, scales = _float_tensors(model), {}, {}
    structures: dict[str, Structure] = {}
    for name, latent, front in baseline_weights(model):
        if quantizer != "zero_bit":
            each, scale = front.codes_and_scales(front.structural(latent))
            if not (each.isfinite().all() and scale.isfinite().all()):
                raise ArtifactError(f"the weight {name!r} is not finite: its training has diverged")
            codes[name], scales[name] = _pack(each, front.bits, trit_base).flatten(), scale.float().flatten()
        elif front.positions is None:
            continue
        structures[name] = front.structure
    entries = ranges({name: (structure, _sizes(name, codes, scales)) for name, structure in structures.items()})
    order = [name for entry in entries for name in expand(entry)]
    stored = StoredStructures.of(structures[expand(entry)[0]] for entry in entries)
    for key, parts in ((_CODES, codes), (_SCALES, scales)):
        if sum(part.numel() for part in parts.values()):
            tensors[key] = torch.cat([parts[name] for name in order])
    if structures:
        tensors[_STRUCTURES] = stored.content
    layers = [[entry, number] for entry, number in zip(entries, stored.numbers, strict=True)]
    fields = {"quantizer": quantizer, "base": trit_base, "structures": stored.lengths, "layers": layers}
    header = json.dumps(fields, separators=(",", ":"))
    path = Path(path)
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata={"baseline": header})
    return path


@torch.no_grad()
def load_baseline(path: str | Path, into: nn.Module) -> nn.Module:
    """Read a file of `save_baseline` into the float solver that it belongs to, in place.

    Args:
        path: of the file.
        into: the solver as its constructor makes it; that of a ``zero_bit`` file keeps the weights it has.

    Returns:
        The same solver, with plain float weights of the quantized values, bit for bit.

    Raises:
        ArtifactError: the file is damaged, or does not belong to this solver.
        FileNotFoundError: there is no such file.
    """
    header, tensors = _read(path)
    try:
        layers = _layers(header, tensors)
        if header["quantizer"] == "fp32_dense":
            for target in resolve_targets(into, dict.fromkeys(layers)):
                densify_weight(target)
        codes, scales = (tensors.pop(key, torch.empty(0)) for key in (_CODES, _SCALES))
        targets = {target.name: target for target in (resolve_targets(into, layers) if layers else [])}
        for target in (targets[name] for name in layers):
            front = BASELINES[header["quantizer"]](target)
            values = front.structural(target.parameter)
            if header["quantizer"] != "zero_bit":
                taken = len(_pack(torch.zeros(values.numel()), front.bits, header["base"]))
                own = _unpack(codes[:taken], front.bits, values.numel(), header["base"]).to(values.dtype)
                count = front.codes_and_scales(values)[1].numel()
                values = front.weight(own.reshape(values.shape), scales[:count].to(values.dtype))
                codes, scales = codes[taken:], scales[count:]
            target.parameter.copy_(front.stored(values))
        left = into.load_state_dict(tensors, strict=False)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, PIBiNNError) as error:
        raise ArtifactError(f"{path} does not belong to this solver: {error}") from error
    missing = set() if header["quantizer"] == "zero_bit" else set(left.missing_keys) - layers.keys()
    if missing or left.unexpected_keys or scales.numel() or codes.numel():
        raise ArtifactError(
            f"{path} does not belong to this solver: it lacks {sorted(missing)}, the solver has no "
            f"{left.unexpected_keys}, {codes.numel()} bytes of codes and {scales.numel()} scales are left over"
        )
    return into


@dataclass(frozen=True)
class StoredSize:
    """What a packed file takes on disk, baseline or `pibinn_plugin.save`."""

    file_bytes: int
    weight_bits: int  # codes, scales and structures; the rest are float parameters and the header

    @property
    def file_bits(self) -> int:
        """The whole file."""
        return 8 * self.file_bytes


def stored_size(path: str | Path) -> StoredSize:
    """Count a packed file.

    Raises:
        ArtifactError: the file is of neither kind, or damaged.
        FileNotFoundError: there is no such file.
    """
    header, tensors = _read(path)
    layers = header.get("layers") if isinstance(header, dict) else None
    if not isinstance(layers, list) or not all(isinstance(layer, list) for layer in layers):
        raise ArtifactError(f"{path} is not a packed file: its header has no layers")
    of_weights = (value for key, value in tensors.items() if key.startswith(("baseline.", "pibinn.")))
    return StoredSize(Path(path).stat().st_size, 8 * sum(value.numel() * value.element_size() for value in of_weights))


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no packed file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
        return json.loads(metadata.get("baseline") or metadata["pibinn"]), tensors
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a packed file: {error!r}") from error


def _layers(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Structure | None]:
    """Name and structure of each weight of a file."""
    content = tensors.pop(_STRUCTURES, torch.empty(0, dtype=torch.uint8))
    entries, numbers = [entry for entry, _ in header["layers"]], [number for _, number in header["layers"]]
    decoded = StoredStructures(content, header["structures"], numbers).decode()
    return {name: structure for entry, structure in zip(entries, decoded, strict=True) for name in expand(entry)}


def _sizes(name: str, *parts: dict[str, Tensor]) -> tuple[int, ...]:
    return tuple(part[name].numel() for part in parts if name in part)


def _float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the quantized weights and what belongs to their quantizers."""
    fronts = [name.rpartition(".") for name, _, _ in baseline_weights(model)]
    prefixes = tuple(f"{module}{dot}parametrizations.{parameter}." for module, dot, parameter in fronts)
    # Clones: safetensors refuses tensors that share memory, as tied parameters do.
    return {
        key: value.detach().clone().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(prefixes)
    }


def _pack(codes: Tensor, bits: int | None, trit_base: int) -> Tensor:
    if bits is None:
        return codes.float()
    if bits >= 8:
        return codes.to(_DTYPES[bits]).view(torch.uint8)
    return pack_bits(codes >= 0) if bits == 1 else pack_trits(codes, trit_base)


def _unpack(packed: Tensor, bits: int | None, count: int, trit_base: int) -> Tensor:
    if bits is None:
        return packed
    if bits >= 8:
        return packed.view(_DTYPES[bits])
    return unpack_bits(packed, count) * 2.0 - 1.0 if bits == 1 else unpack_trits(packed, count, trit_base)
