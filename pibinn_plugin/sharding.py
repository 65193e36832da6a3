"""Parameters that FSDP2 spreads over ranks: reading them whole, and writing them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all its parts together, which every rank has to ask for."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(value: Tensor, parameter: Tensor) -> Tensor:
    """A value that every rank holds whole, on the device of a parameter and spread over the ranks as that is."""
    value = value.to(parameter.device)
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a parameter, or this rank's part of it, with a value that every rank holds whole."""
    parameter.copy_(part_of(value.to(parameter.dtype).reshape(parameter.shape), parameter))


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters, which the optimizer steps, in place of those of the last forward.

    After a forward without a backward (validation), FSDP2's root module holds whole parameters: copies.
    """
    for module in model.modules():
        if callable(own_reshard := getattr(module, "reshard", None)):
            own_reshard()
