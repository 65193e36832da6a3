"""Learned patterns of a micromirror device: each mirror sends its light to one of two detectors, which is one bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.block_patterns import PatternOperator
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["MirrorPatterns"]


@records_arguments
class MirrorPatterns(PatternOperator):
    r"""Learned patterns at full light: their largest entry has the magnitude 1/block, whatever the weights' scale.

    .. math:: A = \frac{1}{b} \, \frac{W}{\max |W|}

    With one-bit weights W = λ sign(V), A is sign(V)/b exactly, the patterns of `BlockPatterns`: λ, which is the light,
    cancels out. Ternary weights become entries 0 and ±1/b in the same way. Float weights, which a device shows by
    several exposures at best, would be dimmed by their largest entry: `clip` limits them to ±1 first, with the gradient
    of the identity.

    Weights start with the signs of given patterns, and magnitudes uniform in [0.3, 1]: those of small magnitude change
    sign first.

    Args:
        start: the patterns whose signs the weights start with, which also give the size of a block, the number of
            patterns, and the correlation of pixels.
        clip: limit the weights to [-1, 1].

    Example:
        >>> from lightning_modules.walsh_patterns import WalshPatterns
        >>> learned = MirrorPatterns(WalshPatterns(block_size=4, measurements=4))
        >>> learned.weight.shape, learned.A(torch.rand(2, 1, 8, 12)).shape
        (torch.Size([4, 16]), torch.Size([2, 4, 2, 3]))
    """

    def __init__(self, start: PatternOperator, clip: bool = False) -> None:
        super().__init__(start.block_size, start.shape[0], start.correlation)
        self.clip = clip
        signs = start.matrix().detach().sign()
        self.weight = nn.Parameter(signs * (0.3 + 0.7 * torch.rand(self.shape)))

    @override
    def matrix(self) -> Tensor:
        weight: Tensor = self.weight
        if self.clip:
            weight = weight + (weight.clamp(-1, 1) - weight).detach()
        return weight / (weight.abs().amax() * self.block_size)
