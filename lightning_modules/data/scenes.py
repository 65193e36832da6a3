"""Scenes of the Berkeley Segmentation Data Set, for a camera whose network measures them itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.data.bsds500 import BSDS500, GREY_LEVELS

__all__ = ["BSDS500Scenes"]


class BSDS500Scenes(BSDS500):
    r"""Batches `(scene, x)`: the patterns are part of the network, which measures the images x on its own.

    A scene has the shape (batch, block² + measurements, rows, columns): for each block of the image its pixels, row by
    row, and the noise of its exposures, white, of standard deviation `noise_level` / 255. The noise is that of the
    detectors: no pattern changes it. Like the images it follows from the seed, the epoch and the position in it, as in
    `BSDS500`: a run that was stopped goes on bit for bit, and all patterns are compared at the same noise.

    Args:
        data_dir: as for `BSDS500`.
        block_size: Pixels of a block's side.
        measurements: Exposures of a block.
        noise_level: Standard deviation of the noise of an exposure, in grey levels of 255, for patterns of unit norm.
        patch_size: Height and width of the training patches, a multiple of the block size.
        batch_size: Patches a batch, on each rank.
        train_patches: Patches an epoch.
        seed: Seed of the training patches and of their noise.

    Raises:
        ValueError: If an argument is out of range.
        DataFileError: By `setup`, as `BSDS500`.

    Example:
        >>> data = BSDS500Scenes("folder", block_size=4, measurements=3)
        >>> data.measure(torch.rand(2, 1, 8, 12), [np.random.default_rng(0), np.random.default_rng(1)]).shape
        torch.Size([2, 19, 2, 3])
    """

    def __init__(
        self,
        data_dir: str | Path,
        block_size: int = 16,
        measurements: int = 64,
        noise_level: float = 1.0,
        patch_size: int = 64,
        batch_size: int = 8,
        train_patches: int = 8000,
        seed: int = 0,
    ) -> None:
        # Any patterns: for the size of blocks, which images are cut to, and for the magnitude of measurements.
        self.example_patterns = BlockPatterns(block_size, measurements)
        super().__init__(data_dir, self.example_patterns, noise_level, patch_size, batch_size, train_patches, seed=seed)

    @override
    def measure(self, x: Tensor, draws: Sequence[np.random.Generator]) -> Tensor:
        """The scene of images x, shape (batch, 1, height, width), with noise from the generator of each."""
        blocks = F.pixel_unshuffle(x, self.block_size)
        shape = (self.example_patterns.shape[0], *blocks.shape[2:])
        noise = np.stack([random.standard_normal(shape, dtype=np.float32) for random in draws])
        return torch.cat([blocks, self.noise_level / GREY_LEVELS * torch.from_numpy(noise)], dim=1)
