"""What a prepared or packed model stores beside its one-bit weights: every other tensor, once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pibinn_plugin.errors import ArtifactError
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.structure.checkpoint import StructureInStateDict
from pibinn_plugin.weights import one_bit_weights, plain_name, uncompiled


@dataclass(frozen=True, eq=False)
class FloatTensor:
    """A tensor of the state dict that is neither a one-bit weight, nor λ, nor the description of a structure."""

    keys: tuple[str, ...]  # in the state dict of the float model; several where modules share the tensor
    tensor: Tensor  # the parameter or buffer itself


def float_tensors(model: nn.Module) -> list[FloatTensor]:
    """The float tensors of a model, each once, in the order of its state dict.

    Raises:
        ArtifactError: a state that is no tensor, which only pickle could store, or a tensor that is not strided.
    """
    root = uncompiled(model)
    one_bit = {id(weight.tensor) for weight in one_bit_weights(root)}
    found: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for key, value in root.state_dict(keep_vars=True).items():
        module_name, _, entry = key.rpartition(".")
        module = root.get_submodule(module_name)
        is_structure = entry == "_extra_state" and isinstance(module, StructureInStateDict)
        if is_structure or isinstance(module, GlobalScale) or id(getattr(value, "bits", value)) in one_bit:
            continue
        if not isinstance(value, Tensor):
            raise ArtifactError(f"the state {key!r} is a {type(value).__name__}; a packed file stores tensors only")
        if value.layout is not torch.strided or value.is_quantized:
            raise ArtifactError(
                f"{key!r} is stored as {value.layout}, and a packed file stores strided tensors only: register it as "
                f"a dense buffer, or with persistent=False where the model makes it itself"
            )
        found.setdefault(id(value), []).append(plain_name(key))
        tensors[id(value)] = value
    return [FloatTensor(tuple(keys), tensors[identity]) for identity, keys in found.items()]


def stored_scale(value: float) -> Tensor:
    """λ as the file holds it: float32 where that is exact, else float64."""
    narrow = torch.tensor([value], dtype=torch.float32, device="cpu")
    return narrow if narrow.item() == value else torch.tensor([value], dtype=torch.float64, device="cpu")
