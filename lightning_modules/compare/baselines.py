"""The quantizers that one global scale is compared with, as torch parametrizations of the same weights.

Each stands in front of the latent V of one target, with the structure M of that target, and quantizes the structural
nonzeros only. What it stores is codes, small whole numbers, and a few float32 scales: `codes_and_scales` gives them,
`weight` puts them together again, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.quantizer import sign_ste
from pibinn_plugin.structure import Structure
from pibinn_plugin.structure.base import matrix_shape
from pibinn_plugin.structure.checkpoint import StructureInStateDict
from pibinn_plugin.targets import Target

__all__ = [
    "BaselineQuantizer",
    "ChannelWiseSign",
    "FloatWeight",
    "HalfWeight",
    "Int8Weight",
    "LayerWiseSign",
    "TernaryAbsMean",
    "TernaryTWN",
    "baseline_weights",
]


class BaselineQuantizer(StructureInStateDict, nn.Module, ABC):
    """Maps the latents of one weight to quantized ones; while not ``enabled`` (float warm-up), to ``V ⊙ M``.

    Args:
        target: the weight, as `pibinn_plugin.targets.resolve_targets` finds it.

    Raises:
        StructureError: when a state dict is loaded that was made for another structure.
    """

    bits: ClassVar[int | None]  # of one code: 1 (signs), 2 (ternary), 8, 16 (float16); None where weights stay float32
    enabled: Tensor
    positions: Tensor | None
    structure: Structure

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.structure, self.shape, self.compact = target.structure, target.shape, target.compact
        device, self.stored_shape = target.parameter.device, tuple(target.parameter.shape)
        is_masked = not self.compact and self.structure.nnz(self.shape) < target.parameter.numel()
        self.register_buffer(
            "positions", self.structure.positions(self.shape).to(device) if is_masked else None, persistent=False
        )
        self.register_buffer("enabled", torch.tensor(True, device=device))

    def structural(self, latent: Tensor) -> Tensor:
        """The structural nonzeros of a latent as it is stored in the module, shape ``(nnz,)``."""
        return latent.flatten() if self.positions is None else latent.flatten()[self.positions]

    def stored(self, values: Tensor) -> Tensor:
        """Invert `structural`: zeros outside the structure."""
        if self.positions is not None:
            values = values.new_zeros(torch.Size(self.stored_shape).numel()).index_copy(0, self.positions, values)
        return values.reshape(self.stored_shape)

    @override
    def forward(self, latent: Tensor) -> Tensor:
        values = self.structural(latent)
        return self.stored(self.quantize(values) if self.enabled else values)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning a weight to a parametrized parameter sets its latents."""
        return weight

    @torch.no_grad()
    def switch(self, latent: Tensor, enabled: bool) -> None:
        """Begin or end to quantize; what has to be found where quantization begins is found from the latent."""
        if enabled and not self.enabled:
            self.begin(self.structural(latent))
        self.enabled.fill_(enabled)

    def begin(self, values: Tensor) -> None:
        """Set what is learned beside the latents from the structural latents at which quantization begins."""

    @abstractmethod
    def quantize(self, values: Tensor) -> Tensor:
        """The quantized structural nonzeros, shape ``(nnz,)``, differentiable in the latent ones."""

    @abstractmethod
    def codes_and_scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a file holds of structural latents: codes, shape ``(nnz,)``, and scales, shape ``(scales,)``."""

    @abstractmethod
    def weight(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The quantized structural nonzeros that codes and scales stand for."""


class FloatWeight(BaselineQuantizer):
    """``V ⊙ M`` in float32, the same structure without quantization.

    Example:
        >>> from pibinn_plugin import BlockDiagonal
        >>> from pibinn_plugin.targets import resolve_targets
        >>> [target] = resolve_targets(nn.Linear(2, 2), {"weight": BlockDiagonal(2)})
        >>> FloatWeight(target)(torch.ones(2, 2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    bits = None

    @override
    def quantize(self, values: Tensor) -> Tensor:
        return values

    @override
    def codes_and_scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values, values.new_empty(0)

    @override
    def weight(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes


class _Rounded(BaselineQuantizer):
    """Codes and at most one scale a weight, both functions of the latents, to which the gradient passes unchanged."""

    @override
    def quantize(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.weight(*self.codes_and_scales(values))
        return weight + (values - values.detach())

    @override
    def weight(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes * scales


class HalfWeight(_Rounded):
    """``V ⊙ M`` rounded to float16.

    Example:
        >>> from pibinn_plugin.targets import resolve_targets
        >>> [target] = resolve_targets(nn.Linear(2, 1), {"weight": None})
        >>> HalfWeight(target)(torch.tensor([[1.0, 1.0001]]))
        tensor([[1., 1.]])
    """

    bits = 16

    @override
    def codes_and_scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values.half().to(values.dtype), values.new_empty(0)

    @override
    def weight(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes


class Int8Weight(_Rounded):
    """``s round(V / s) ⊙ M`` with ``s = max|V| / 127``: eight bits, symmetric, one scale for each weight.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
    2018, with their straight-through gradient and without a zero point, which weights around 0 do not need.

    Example:
        >>> from pibinn_plugin.targets import resolve_targets
        >>> [target] = resolve_targets(nn.Linear(3, 1), {"weight": None})
        >>> Int8Weight(target)(torch.tensor([[-127.0, 0.4, 63.6]]))
        tensor([[-127.,    0.,   64.]])
    """

    bits = 8

    @override
    def codes_and_scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        scale = values.abs().amax() / 127
        return (values / scale.clamp_min(torch.finfo(values.dtype).tiny)).round(), scale.reshape(1)


class _Ternary(_Rounded):
    """Codes -1, 0, 1 and one scale a weight; the gradient passes to the latents unchanged, as in both papers."""

    bits = 2


class TernaryTWN(_Ternary):
    """``α sign(V)`` where ``|V| > Δ``, else 0, with ``Δ = 0.7 mean|V|`` and α the mean of the ``|V|`` that are kept.

    Li, Zhang and Liu, "Ternary Weight Networks", arXiv 1605.04711.

    Example:
        >>> from pibinn_plugin.targets import resolve_targets
        >>> [target] = resolve_targets(nn.Linear(3, 1), {"weight": None})
        >>> TernaryTWN(target)(torch.tensor([[-1.0, 0.1, 2.9]]))
        tensor([[-1.9500,  0.0000,  1.9500]])
    """

    @override
    def codes_and_scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = values.abs()
        kept = magnitude > 0.7 * magnitude.mean()
        scale = (magnitude * kept).sum() / kept.sum().clamp_min(1)
        return values.sign() * kept, scale.reshape(1)


class TernaryAbsMean(_Ternary):
    """``γ clip(round(V / γ), -1, 1)`` with ``γ = mean|V|``.

    Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (BitNet b1.58), arXiv 2402.17764,
    equations 1 to 3. Its ε beside γ is the smallest normal number here, so that the result scales with V.

    Example:
        >>> from pibinn_plugin.targets import resolve_targets
        >>> [target] = resolve_targets(nn.Linear(3, 1), {"weight": None})
        >>> TernaryAbsMean(target)(torch.tensor([[-1.0, 0.25, 1.75]]))
        tensor([[-1.,  0.,  1.]])
    """

    @override
    def codes_and_scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        scale = values.abs().mean()
        return (values / scale.clamp_min(torch.finfo(values.dtype).tiny)).round().clamp(-1, 1), scale.reshape(1)


class _ScaledSign(BaselineQuantizer):
    """``α sign(V)`` with learned α, as λ is learned; the gradient goes through the sign unchanged.

    α starts at the least-squares scales, the means of ``|V|`` (XNOR-Net, arXiv 1603.05279, equation 6). There α follows
    the latents to the end; learned scales can become any that those can, and are trained like λ.
    """

    bits = 1
    scales: nn.Parameter

    @abstractmethod
    def least_squares_scales(self, values: Tensor) -> Tensor:
        """The α, shape ``(scales,)``, that brings ``α sign(V)`` closest to structural latents."""

    @override
    def begin(self, values: Tensor) -> None:
        self.scales.copy_(self.least_squares_scales(values))

    @override
    def quantize(self, values: Tensor) -> Tensor:
        return self.weight(sign_ste(values), self.scales)

    @override
    def codes_and_scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(values >= 0, 1.0, -1.0).to(values.dtype), self.scales


class LayerWiseSign(_ScaledSign):
    """``α sign(V) ⊙ M`` with one learned α for each weight, at first ``mean|V|``.

    Example:
        >>> from pibinn_plugin.targets import resolve_targets
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-1.0, 1.0], [2.0, 4.0]]))
        >>> [target] = resolve_targets(layer, {"weight": None})
        >>> LayerWiseSign(target)(layer.weight).tolist()
        [[-2.0, 2.0], [2.0, 2.0]]
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.scales = nn.Parameter(self.least_squares_scales(self.structural(target.parameter.detach())))

    @override
    def least_squares_scales(self, values: Tensor) -> Tensor:
        return values.abs().mean().reshape(1)

    @override
    def weight(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes * scales


class ChannelWiseSign(_ScaledSign):
    """``α_i sign(V_ij) ⊙ M`` with a learned α_i for each row, at first ``mean|V|`` over its structural nonzeros.

    A row is an output channel: of a convolution all entries of ``weight[i]``, else the entries along the last
    dimension (of a row in its block, for compact blocks).

    Example:
        >>> from pibinn_plugin.targets import resolve_targets
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-1.0, 1.0], [2.0, 4.0]]))
        >>> [target] = resolve_targets(layer, {"weight": None})
        >>> ChannelWiseSign(target)(layer.weight).tolist()
        [[-1.0, 1.0], [3.0, 3.0]]
    """

    rows: Tensor
    columns_of: Tensor

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        rows, count = _row_of_each(target).unique(return_inverse=True, return_counts=True)[1:]
        self.register_buffer("rows", rows.to(target.parameter.device), persistent=False)
        self.register_buffer("columns_of", count.to(target.parameter.device), persistent=False)
        self.scales = nn.Parameter(self.least_squares_scales(self.structural(target.parameter.detach())))

    @override
    def least_squares_scales(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.columns_of)).index_add(0, self.rows, values.abs()) / self.columns_of

    @override
    def weight(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes * scales[self.rows]


def _row_of_each(target: Target) -> Tensor:
    """The row of each structural nonzero, in the order of `BaselineQuantizer.structural`."""
    stored = target.parameter
    is_flat = target.compact and stored.dim() == 1
    if is_flat or (not target.compact and target.structure.nnz(target.shape) < stored.numel()):
        index, shape = target.structure.positions(target.shape), target.shape
    else:
        index, shape = torch.arange(stored.numel()), tuple(stored.shape)
    is_convolution = isinstance(target.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return index // (matrix_shape(shape)[1] if is_convolution else shape[-1])


def baseline_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, BaselineQuantizer]]:
    """Name, latent and quantizer of each weight of a model that has a baseline quantizer in front of it."""
    for module_name, module in model.named_modules():
        for parameter_name, chain in getattr(module, "parametrizations", {}).items():
            if isinstance(chain[0], BaselineQuantizer):
                yield f"{module_name}.{parameter_name}".removeprefix("."), chain.original, chain[0]
