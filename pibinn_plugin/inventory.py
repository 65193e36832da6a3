"""What a prepared or packed model stores: its one-bit weights, and every other tensor."""

from collections.abc import Iterator

from torch import Tensor, nn

from pibinn_plugin.errors import ArtifactError
from pibinn_plugin.packing import packed_signs_of
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.structure import Shape, Structure
from pibinn_plugin.structure.checkpoint import StructureInStateDict
from pibinn_plugin.workflow import quantized_weights


def one_bit_weights(model: nn.Module) -> Iterator[tuple[str, Structure, Shape]]:
    """Name, structure and dense shape of each one-bit weight, packed or still with its latent."""
    for name, packed in packed_signs_of(model):
        yield name, packed.structure, packed.shape
    for weight in quantized_weights(model):
        yield weight.name, weight.quantizer.structure, weight.quantizer.shape


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the state dict that is neither a one-bit weight, nor λ, nor the description of a structure.

    Raises:
        ArtifactError: a state that is no tensor, which only pickle could store.
    """
    one_bit = {id(weight.latent) for weight in quantized_weights(model)}
    one_bit |= {id(packed.bits) for _, packed in packed_signs_of(model)}
    tensors = {}
    for key, value in model.state_dict(keep_vars=True).items():
        module_name, _, entry = key.rpartition(".")
        module = model.get_submodule(module_name)
        is_structure = entry == "_extra_state" and isinstance(module, StructureInStateDict)
        if is_structure or isinstance(module, GlobalScale) or id(value) in one_bit or hasattr(value, "packed_signs"):
            continue
        if not isinstance(value, Tensor):
            raise ArtifactError(f"the state {key!r} is a {type(value).__name__}; a packed file stores tensors only")
        tensors[key] = value.detach()
    return tensors
