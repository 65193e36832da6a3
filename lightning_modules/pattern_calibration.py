"""Calibration of a single-pixel camera: its ±1 patterns from blocks of known images and their measurements."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.initialization import SignsFromPairs

__all__ = ["SignsFromBlocks", "block_pairs"]


def block_pairs(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The measurements and the pixels of all blocks of images, (blocks, measurements) and (blocks, block²).

    Args:
        y: shape ``(batch, measurements, rows, columns)``, one position for each block.
        x: shape ``(batch, 1, rows · block, columns · block)``.

    Raises:
        ValueError: other shapes.

    Example:
        >>> y, x = block_pairs(torch.zeros(1, 3, 1, 2), torch.arange(8.0).view(1, 1, 2, 4))
        >>> y.shape, x
        (torch.Size([2, 3]), tensor([[0., 1., 4., 5.],
                [2., 3., 6., 7.]]))
    """
    block = x.shape[-1] // y.shape[-1] if y.dim() == 4 and y.numel() else 0
    if x.shape != (len(y), 1, *(block * extent for extent in y.shape[2:])) or block < 1:
        raise ValueError(
            f"y has shape {tuple(y.shape)} and x {tuple(x.shape)}: they must be (batch, measurements, rows, columns) "
            f"and (batch, 1, rows · block, columns · block)"
        )
    blocks = F.pixel_unshuffle(x, block)
    return y.permute(0, 2, 3, 1).flatten(0, 2), blocks.permute(0, 2, 3, 1).flatten(0, 2)


class SignsFromBlocks(SignsFromPairs):
    """Start the one-bit patterns of `LearnedBlockPatterns` from training images and their measurements.

    The pairs are those of all blocks, see `block_pairs`. What the device shows is ±1, here ±1/block: λ is known.

    Args:
        block_size: pixels of a block's side.
        max_pairs: read no more blocks than these, on each rank; all batches unless given.
        weights: pattern of the name of the patterns' weight.

    Raises:
        PIBiNNError: by the call, if the blocks have another size, do not fit the patterns or are not finite.

    Example:
        >>> import pibinn_plugin as pb
        >>> from lightning_modules.block_patterns import BlockPatterns, LearnedBlockPatterns
        >>> truth, x = BlockPatterns(block_size=4, measurements=4), torch.randn(5, 1, 16, 16)
        >>> learned = pb.prepare(LearnedBlockPatterns(block_size=4, measurements=4), {"weight": None})
        >>> SignsFromBlocks(block_size=4)(learned, [(truth.A(x), x)])
        >>> torch.allclose(learned.weight, truth.patterns)
        True
    """

    def __init__(self, block_size: int, max_pairs: int | None = None, weights: str = "*") -> None:
        super().__init__(max_pairs=max_pairs, weights=weights, scale=1 / block_size)
        self.block_size = block_size

    @override
    def read(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, measurements = super().read(batch)
        outputs, inputs = block_pairs(measurements, images)
        if inputs.shape[1] != self.block_size**2:
            raise PIBiNNError(
                f"the measurements {tuple(measurements.shape)} of images {tuple(images.shape)} are of blocks of "
                f"{inputs.shape[1]} pixels; block_size={self.block_size} expects {self.block_size**2}"
            )
        return inputs, outputs
