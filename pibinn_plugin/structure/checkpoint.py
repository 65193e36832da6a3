"""The structure of a weight travels in every state dict, and another one than the model's is refused."""

import torch
from torch import Tensor

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure.base import Structure


class StructureInStateDict:
    """For a module with a ``structure``: it is the module's extra state, as bytes.

    Raises:
        StructureError: in ``load_state_dict``, when the state dict was made for another structure.
    """

    structure: Structure
    shape: tuple[int, ...]

    def get_extra_state(self) -> Tensor:
        """The structure as uint8, shape ``(bytes,)``."""
        return torch.tensor(list(self.structure.to_bytes()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state dict that was made for another structure."""
        if is_placeholder(state):
            return
        stored = Structure.from_bytes(bytes(state.tolist()))
        if stored != self.structure:
            raise StructureError(
                f"the state dict holds a weight with {stored}, this model one of shape {self.shape} with "
                f"{self.structure}; prepare the model with the structures it was trained with"
            )


def is_placeholder(state: object) -> bool:
    """Whether this is what torch's ``set_model_state_dict(broadcast_from_rank0=True)`` gives for an extra state."""
    return type(state).__name__ == "_EXTRA_STATE"
