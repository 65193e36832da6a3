"""The structure of a weight travels in every state dict, and another one than the model's is refused."""

import torch
from torch import Tensor

from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure.base import Structure, short


class StructureInStateDict:
    """For a module with a ``structure``: it is the module's extra state, as bytes.

    Raises:
        StructureError: in ``load_state_dict``, when the state dict was made for another structure.
    """

    structure: Structure
    shape: tuple[int, ...]

    def get_extra_state(self) -> Tensor:
        """The structure as uint8, shape ``(bytes,)``."""
        return torch.tensor(list(self.structure.to_bytes()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state dict that was made for another structure."""
        if is_placeholder(state):
            return
        content = bytes(checked_state(state).tolist())
        if content != self.structure.to_bytes():  # as bytes: what is read is not built before it is known to be ours
            stored = Structure.from_bytes(content)
            raise StructureError(
                f"the state dict holds a weight with {stored}, this model one of shape {self.shape} with "
                f"{self.structure}; prepare the model with the structures it was trained with"
            )


def checked_state(state: object) -> Tensor:
    """The extra state as uint8.

    Averaging checkpoints by hand makes floats of it, which are whole numbers still where all had the same structure.

    Raises:
        StructureError: it is no list of bytes.
    """
    # Contiguous: a view may repeat one stored byte without end.
    is_list = isinstance(state, Tensor) and state.dim() == 1 and state.numel() > 0 and state.is_contiguous()
    if isinstance(state, Tensor) and is_list and not state.is_complex():
        content = state.to(torch.uint8)
        if torch.equal(content.to(state.dtype), state):
            return content
    raise StructureError(
        f"the state dict holds no structure where one is stored, but {_described(state)}; extra states are bytes, "
        f"which averaging of different ones destroys"
    )


def _described(state: object) -> str:
    return f"a tensor of shape {tuple(state.shape)}" if isinstance(state, Tensor) else short(state)


def is_placeholder(state: object) -> bool:
    """Whether this is what torch's ``set_model_state_dict(broadcast_from_rank0=True)`` gives for an extra state."""
    return type(state).__name__ == "_EXTRA_STATE"
