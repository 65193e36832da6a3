"""The operator of single-pixel imaging: each block of an image is measured with the same ±1 patterns."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.storage.recipe import records_arguments

__all__ = [
    "BlockPatterns",
    "Correlation",
    "EvaluatedPatterns",
    "ImageOperator",
    "LearnedBlockPatterns",
    "PatternOperator",
    "block_adjoint",
    "block_measure",
]


Correlation = Literal["separable", "isotropic"]

# Of neighbouring pixels of natural images; and the variance of the noise in units of that inside a block, which keeps
# the linear estimate from trusting its model too far.
NEIGHBOURS: dict[Correlation, float] = {"separable": 0.9, "isotropic": 0.95}
NOISE_VARIANCE: dict[Correlation, float] = {"separable": 0.01, "isotropic": 0.001}
MEAN_VARIANCE = 4.0  # of the mean of a block, in the same unit


class ImageOperator(Protocol):
    """What a solver needs of an operator that measures images (batch, 1, height, width)."""

    def A(self, x: Tensor) -> Tensor:
        """Images to measurements."""

    def A_dagger(self, y: Tensor) -> Tensor:
        """Measurements to the images of least norm that have them: the pseudo-inverse."""

    def linear_estimate(self, y: Tensor) -> Tensor:
        """Measurements to a first estimate of the images."""


def block_measure(patterns: Tensor, x: Tensor) -> Tensor:
    """Measure the blocks of images with patterns.

    Args:
        patterns: shape ``(measurements, block²)``, each row a pattern of block × block pixels, row by row.
        x: images, shape ``(batch, 1, height, width)``, height and width multiples of the block.

    Returns:
        Shape ``(batch, measurements, height / block, width / block)``.

    Raises:
        ValueError: x has another shape.

    Example:
        >>> block_measure(torch.ones(1, 4), torch.arange(8.0).view(1, 1, 2, 4))
        tensor([[[[10., 18.]]]])
    """
    block = round(patterns.shape[1] ** 0.5)
    if x.dim() != 4 or x.shape[1] != 1 or x.shape[2] % block or x.shape[3] % block:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: it must be (batch, 1, height, width), height and width multiples of {block}"
        )
    # Several times as fast as a convolution of that stride, above all backwards.
    return torch.einsum("mp,bphw->bmhw", patterns, F.pixel_unshuffle(x, block))


def block_adjoint(patterns: Tensor, y: Tensor) -> Tensor:
    """The adjoint of `block_measure`: from ``(batch, measurements, rows, columns)`` to images.

    Example:
        >>> block_adjoint(torch.ones(1, 4), torch.tensor([[[[10.0, 18.0]]]]))
        tensor([[[[10., 10., 18., 18.],
                  [10., 10., 18., 18.]]]])
    """
    block = round(patterns.shape[1] ** 0.5)
    return F.pixel_shuffle(torch.einsum("mp,bmhw->bphw", patterns, y), block)


class EvaluatedPatterns(NamedTuple):
    """Patterns and the transposed pseudo-inverse of them, both of shape ``(measurements, block²)``."""

    patterns: Tensor
    transposed_inverse: Tensor

    def A(self, x: Tensor) -> Tensor:
        """Images to measurements: see `block_measure`."""
        return block_measure(self.patterns, x)

    def A_dagger(self, y: Tensor) -> Tensor:
        """Measurements to the images of least norm that have them."""
        return block_adjoint(self.transposed_inverse, y)


class PatternOperator(nn.Module):
    """An operator that measures each block of an image with the same patterns."""

    covariance: Tensor

    def __init__(self, block_size: int, measurements: int, correlation: Correlation = "separable") -> None:
        super().__init__()
        if correlation not in NEIGHBOURS:
            raise ValueError(f"correlation={correlation!r}: expected one of {', '.join(NEIGHBOURS)}")
        if block_size < 1 or not 1 <= measurements <= block_size**2:
            raise ValueError(
                f"block_size={block_size}, measurements={measurements}: a block has at least one pixel, and at least "
                f"one measurement but no more than pixels"
            )
        self.block_size, self.shape = block_size, (measurements, block_size**2)
        self.correlation = correlation
        places = torch.cartesian_prod(torch.arange(block_size), torch.arange(block_size)).view(-1, 2).float()
        distance = torch.cdist(places, places, p=1.0 if correlation == "separable" else 2.0)
        self.register_buffer("covariance", NEIGHBOURS[correlation] ** distance + MEAN_VARIANCE, persistent=False)

    def matrix(self) -> Tensor:
        """The patterns, one a row, shape ``(measurements, block²)``."""
        raise NotImplementedError

    def A(self, x: Tensor) -> Tensor:
        """Images to measurements: see `block_measure`."""
        return block_measure(self.matrix(), x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Measurements to images: see `block_adjoint`."""
        return block_adjoint(self.matrix(), y)

    def A_dagger(self, y: Tensor) -> Tensor:
        """The pseudo-inverse ``Aᵀ (A Aᵀ)⁻¹ y``; a little ridge keeps alike patterns apart."""
        return self.evaluated().A_dagger(y)

    def evaluated(self) -> EvaluatedPatterns:
        """The patterns as they are now, with their pseudo-inverse: for the many products of one pass of a solver."""
        patterns = self.matrix()
        gram = patterns @ patterns.T
        ridge = 1e-5 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
        return EvaluatedPatterns(patterns, torch.linalg.solve(gram + ridge, patterns))

    def linear_estimate(self, y: Tensor) -> Tensor:
        r"""The linear estimate of least squared error, block by block.

        .. math:: x = \Sigma A^\top (A \Sigma A^\top + \epsilon)^{-1} y

        Σ is the covariance of natural images with a mean of any size: known, and not stored. Its ``correlation`` is
        that of a separable Markov process, 0.9 to the power of the distance along rows plus that along columns, or
        isotropic, 0.95 to the power of the distance (Jain, "Fundamentals of Digital Image Processing", 1989, has both).
        Natural images are closer to the latter, which patterns that are no outer products need.
        """
        patterns = self.matrix()
        seen = patterns @ self.covariance
        noise = NOISE_VARIANCE[self.correlation] * torch.eye(len(patterns), device=y.device, dtype=patterns.dtype)
        return block_adjoint(torch.linalg.solve(seen @ patterns.T + noise, seen), y)


@records_arguments
class BlockPatterns(PatternOperator):
    """Independent patterns of pixels ±1/block, of unit norm, from a seed: block compressed sensing.

    After Gan, "Block Compressed Sensing of Natural Images" (DSP 2007), with the patterns of a micromirror device
    (Duarte et al., "Single-Pixel Imaging via Compressive Sampling", IEEE Signal Processing Magazine, 2008).

    Args:
        block_size: pixels of a block's side.
        measurements: patterns; a quarter of the pixels gives a sampling ratio of 25 %.
        seed: of the patterns.
        correlation: of the pixels, for the linear estimate: ``separable`` or ``isotropic``.

    Raises:
        ValueError: a block without pixels, no measurements, more than pixels, or an unknown correlation.

    Example:
        >>> operator = BlockPatterns(block_size=4, measurements=4)
        >>> operator.A(torch.rand(2, 1, 8, 12)).shape, operator.A_adjoint(torch.rand(2, 4, 2, 3)).shape
        (torch.Size([2, 4, 2, 3]), torch.Size([2, 1, 8, 12]))
    """

    patterns: Tensor

    def __init__(
        self, block_size: int = 16, measurements: int = 64, seed: int = 0, correlation: Correlation = "separable"
    ) -> None:
        super().__init__(block_size, measurements, correlation)
        coins = torch.rand(self.shape, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("patterns", torch.where(coins < 0.5, -1.0, 1.0) / block_size, persistent=False)

    @override
    def matrix(self) -> Tensor:
        return self.patterns


@records_arguments
class LearnedBlockPatterns(PatternOperator):
    """Patterns that are not known and have to be learned: A and Aᵀ with a trained `weight` of one row a pattern.

    The weights start at random, of the magnitude of `BlockPatterns`. With one-bit weights A is λ · sign(V): patterns of
    ±λ, which is what the device shows.

    Args:
        block_size: pixels of a block's side.
        measurements: patterns.
        patterns: where the weights start instead: the true ones are those of a calibrated device, to compare with.

    Raises:
        ValueError: a block without pixels, no measurements, or more than pixels; or patterns of another shape.

    Example:
        >>> operator = LearnedBlockPatterns(block_size=4, measurements=4)
        >>> operator.weight.shape, operator.A(torch.rand(2, 1, 8, 12)).shape
        (torch.Size([4, 16]), torch.Size([2, 4, 2, 3]))
    """

    def __init__(self, block_size: int = 16, measurements: int = 64, patterns: BlockPatterns | None = None) -> None:
        super().__init__(block_size, measurements)
        if patterns is not None and patterns.shape != self.shape:
            raise ValueError(f"the patterns are of shape {patterns.shape}, the weights of shape {self.shape}")
        start = torch.randn(self.shape) / block_size if patterns is None else patterns.matrix().clone()
        self.weight = nn.Parameter(start)

    @override
    def matrix(self) -> Tensor:
        return self.weight
