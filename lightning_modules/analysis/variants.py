"""The twins of one weight in other quantizations: what a table compares the one-bit weight with."""

from __future__ import annotations

import torch
from torch import Tensor

from pibinn_plugin.errors import StructureError
from pibinn_plugin.quantizer import initial_scale, quantize_sign

__all__ = ["weight_variants"]


def weight_variants(latent: Tensor, scale: float | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The twins of one weight by name, all of the same latent and none retrained; means are of structural nonzeros.

    - ``float``: V ⊙ M. ``one-bit global``: ``λ sign(V) ⊙ M`` (arXiv 2502.01908).
    - ``one-bit channel-wise``: ``α_i sign(V_ij) ⊙ M``, ``α_i = mean|V|`` of row i (XNOR-Net, arXiv 1603.05279).
    - ``ternary TWN``: ``α sign(V)`` where ``|V| > 0.7 mean|V|``, else 0; α the mean of those ``|V|`` (1605.04711).
    - ``ternary b1.58``: ``γ clip(round(V / γ), -1, 1)``, ``γ = mean|V|`` (BitNet b1.58, 2402.17764, whose ε beside γ is
      the smallest normal number here, so that the result scales with V).

    Args:
        latent: V, shape ``(blocks, rows, columns)`` or ``(rows, columns)``; rows are output channels, as stored.
        scale: the network's λ; by default ``mean|V|`` of this weight.
        mask: boolean M, same shape: True at the structural nonzeros; None: everywhere.

    Raises:
        StructureError: a mask of another shape or dtype, or without a nonzero.
        ScaleError: no ``scale``, and ``mean|V|`` is zero or not finite.

    Example:
        >>> weight_variants(torch.tensor([[-1.0, 0.1, 2.9]]))["ternary TWN"]
        tensor([[-1.9500,  0.0000,  1.9500]])
    """
    latent = latent.detach()
    mask = torch.ones_like(latent, dtype=torch.bool) if mask is None else mask
    if mask.shape != latent.shape or mask.dtype != torch.bool or not mask.any():
        found = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise StructureError(f"the mask is {found}; expected torch.bool of shape {tuple(latent.shape)} with a True")
    zeros, structural = torch.zeros_like(latent), latent[mask]
    one_scale = latent.new_tensor([initial_scale([structural]) if scale is None else scale])
    row_scales = (latent.abs() * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    return {
        "float": torch.where(mask, latent, zeros),
        "one-bit global": quantize_sign(latent, one_scale, mask),
        "one-bit channel-wise": quantize_sign(latent, row_scales, mask),
        "ternary TWN": zeros.masked_scatter(mask, _ternary_twn(structural)),
        "ternary b1.58": zeros.masked_scatter(mask, _ternary_absmean(structural)),
    }


def _ternary_twn(latent: Tensor) -> Tensor:
    magnitude = latent.abs()
    kept = magnitude > 0.7 * magnitude.mean()
    return (magnitude * kept).sum() / kept.sum().clamp_min(1) * latent.sign() * kept


def _ternary_absmean(latent: Tensor) -> Tensor:
    scale = latent.abs().mean()
    return scale * (latent / scale.clamp_min(torch.finfo(latent.dtype).tiny)).round().clamp(-1, 1)
