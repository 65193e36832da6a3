"""The weight that the forward of a layer computes with, for a module that needs it outside of that forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight of a float, prepared or packed layer as its forward uses it, differentiable by its latents.

    Where a scheme quantizes in the forward of the layer, ``layer.weight`` is the latent. A module that uses one weight
    several times, such as forward and adjoint in every layer of a solver, reads it here once in each forward.

    Example:
        >>> import pibinn_plugin as pb
        >>> layer = pb.prepare(nn.Linear(4, 2), {"weight": None}, scheme="torchao")
        >>> effective_weight(layer).abs().unique().numel()
        1
    """
    module: Any = layer
    if hasattr(module, "weight_fake_quantizer"):  # torchao
        return module.weight_fake_quantizer(module.weight)
    if hasattr(module, "quant_weight"):  # Brevitas
        return module.quant_weight().value
    return module.weight
