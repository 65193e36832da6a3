"""The JSON header of a packed file: what is written, and what is read of files that are not trusted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pibinn_plugin.errors import ArtifactError
from pibinn_plugin.storage.layer_names import count, expand
from pibinn_plugin.storage.operator_probes import Probes, checked_probes
from pibinn_plugin.storage.recipe import Recipe
from pibinn_plugin.structure.base import short, unique_members

FORMAT_VERSION = 4
READABLE = (2, 3, 4)
_MOST_LAYERS = 2**20
_DIGEST_CHARACTERS = 32  # 128 bits: against damage, not against an attacker, who can write a digest too


@dataclass(frozen=True)
class Layer:
    """One entry of ``layers``: weights that are alike but for a number in their name."""

    names: list[str]
    shape: tuple[int, ...]
    structure: int
    nnz: int | None = None  # of each; before format 4 a file did not say


@dataclass(frozen=True)
class Header:
    """What a file says about its tensors."""

    version: int
    structures: list[int]  # bytes of each distinct structure
    layers: list[Layer]
    solver: Recipe | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    operators: Probes = field(default_factory=dict)
    digest: str | None = None

    @property
    def is_one_tensor(self) -> bool:
        """Whether the signs of all weights are one tensor; before format 4 each weight had its own."""
        return self.version >= 4


def header_text(fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The header of these fields and of a file of these tensors, with the digest of both."""
    return _json({**fields, "digest": digest(fields, tensors)})


def digest(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the fields as JSON, their keys sorted, and of the name, dtype, shape and bytes of each tensor.

    The tensors are taken in the order of their names; of the hash, the first 32 hexadecimal digits are kept.
    """
    found = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:_DIGEST_CHARACTERS]


def read_header(path: str | Path, metadata: str, tensors: Mapping[str, Tensor]) -> Header:
    """Check the header of a file, and the file by its digest.

    Raises:
        ArtifactError: a version that is not read, a field that is malformed, or bytes that are not those written.
    """
    try:
        fields = json.loads(metadata, object_pairs_hook=unique_members)
        version = fields["version"]
        if type(version) is not int or version not in READABLE:
            raise ArtifactError(f"{path} has format version {version!r:.40}; this pibinn_plugin reads {READABLE}")
        header = _header_of(fields)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: the JSON metadata is malformed: {error!r}") from error
    if header.digest is not None and header.digest != digest(
        {name: value for name, value in fields.items() if name != "digest"}, tensors
    ):
        raise ArtifactError(f"{path} is damaged: its content is not what was written (the digest differs)")
    names = [name for layer in header.layers for name in layer.names]
    if not names or len(set(names)) != len(names):
        raise ArtifactError(f"{path}: the metadata names no layer, or one twice")
    return header


def checked_inputs(value: object) -> dict[str, Any]:
    """What a network takes in, as a flat JSON object. Raises `ArtifactError` for what is none."""
    if isinstance(value, dict) and all(type(key) is str and _is_plain(item) for key, item in value.items()):
        return value
    raise ArtifactError(f"inputs={short(value)}: expected names with numbers or text, such as sampling_rate=256.0")


def _is_plain(value: object) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return type(value) in (bool, int, str)


def _header_of(fields: dict[str, Any]) -> Header:
    version, structures, layers = fields["version"], fields["structures"], fields["layers"]
    if version < 4:
        old = [Layer([_text(name)], tuple(map(_size, shape)), number) for name, shape, number in layers]
        return Header(version, structures, old)
    if sum(count(_text(entry[0])) for entry in layers) > _MOST_LAYERS or any(count(entry[0]) < 1 for entry in layers):
        raise ValueError(f"more than {_MOST_LAYERS} layers, or a range of none")
    found = [Layer(expand(name), tuple(map(_size, shape)), number, _count(nnz)) for name, shape, number, nnz in layers]
    if type(solver := fields.get("solver")) not in (dict, type(None)):
        raise TypeError(f"{short(solver)} is no recipe")
    operators = checked_probes(fields.get("operators", {}))
    return Header(
        version, structures, found, solver, checked_inputs(fields.get("inputs", {})), operators, _text(fields["digest"])
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise TypeError(f"{value!r} is not a size")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise TypeError(f"{value!r} is no number of signs")
    return value


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
