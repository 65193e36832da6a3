"""Calibration of a single-pixel camera: its ±1 patterns from blocks of known images and their measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pibinn_plugin.errors import TargetError
from pibinn_plugin.sign_regression import PairStatistics, flip_one_sign_a_row, one_bit_latent
from pibinn_plugin.structure import Dense
from pibinn_plugin.workflow import global_scale, quantized_weights

__all__ = ["SignsFromBlocks", "block_pairs", "box_least_squares"]

BOX_STEPS, RELAXATION = 400, 1.6
FLIP_ROUNDS = 60


def block_pairs(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The measurements and the pixels of all blocks of images, (blocks, measurements) and (blocks, block²).

    Args:
        y: shape ``(batch, measurements, rows, columns)``, one position for each block.
        x: shape ``(batch, 1, rows · block, columns · block)``.

    Example:
        >>> y, x = block_pairs(torch.zeros(1, 3, 1, 2), torch.arange(8.0).view(1, 1, 2, 4))
        >>> y.shape, x
        (torch.Size([2, 3]), tensor([[0., 1., 4., 5.],
                [2., 3., 6., 7.]]))
    """
    blocks = F.pixel_unshuffle(x, x.shape[-1] // y.shape[-1])
    return y.permute(0, 2, 3, 1).flatten(0, 2), blocks.permute(0, 2, 3, 1).flatten(0, 2)


def box_least_squares(gram: Tensor, cross: Tensor, bound: float) -> Tensor:
    r"""The V that minimises :math:`\lVert Y - V X \rVert^2` over :math:`|V| \le` ``bound``, by ADMM.

    Blocks of natural images are so alike that the eigenvalues of XᵀX span ten orders of magnitude; a gradient method
    would take as many steps. ADMM (Boyd et al., Foundations and Trends in Machine Learning 3, 2011), over-relaxed, in
    the eigenvectors of XᵀX does not mind.

    Args:
        gram: XᵀX for pairs as rows, shape ``(columns, columns)``.
        cross: YᵀX, shape ``(rows, columns)``.
        bound: of the magnitude of V.

    Returns:
        V, shape ``(rows, columns)``, in float64.

    Example:
        >>> box_least_squares(torch.diag(torch.tensor([1e6, 1.0])), torch.tensor([[5e5, -3.0]]), 1.0)
        tensor([[ 0.5000, -1.0000]], dtype=torch.float64)
    """
    gram, cross = gram.double(), cross.double()
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    penalty = eigenvalues.median().clamp_min(1e-5 * eigenvalues[-1])
    inverse = eigenvectors / (eigenvalues.clamp_min(0) + penalty) @ eigenvectors.mT
    boxed, dual = torch.zeros_like(cross), torch.zeros_like(cross)
    for _ in range(BOX_STEPS):
        free = (cross + penalty * (boxed - dual)) @ inverse
        relaxed = RELAXATION * free + (1 - RELAXATION) * boxed
        boxed = (relaxed + dual).clamp(-bound, bound)
        dual = dual + relaxed - boxed
    return boxed


class SignsFromBlocks:
    """Start the one-bit patterns of `LearnedBlockPatterns` from training patches and their measurements.

    What the device shows is ±1, here ±1/block, so the magnitude is known and only the signs are not: least squares in
    the box of this magnitude (`box_least_squares`), its signs, and greedy flips of one sign a pattern as long as they
    lower the error. It is an ``initialization`` of `TwoStageQAT`.

    Args:
        weights: pattern of the name of the patterns' weight.

    Raises:
        TargetError: by the call, if this names no one-bit weight or more than one.
        PIBiNNError: by the call, if the blocks do not fit the patterns or are not finite.

    Example:
        >>> import pibinn_plugin as pb
        >>> from lightning_modules.block_patterns import BlockPatterns, LearnedBlockPatterns
        >>> truth, x = BlockPatterns(block_size=4, measurements=4), torch.randn(5, 1, 16, 16)
        >>> learned = pb.prepare(LearnedBlockPatterns(block_size=4, measurements=4), {"weight": None})
        >>> SignsFromBlocks("weight")(learned, [(truth.A(x), x)])
        >>> torch.allclose(learned.weight, truth.patterns)
        True
    """

    def __init__(self, weights: str = "*operator.weight") -> None:
        self.weights = weights

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, batches: Iterable[Any], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Set the latents and λ from batches (y, x) of measurements and patches."""
        named = [weight for weight in quantized_weights(model) if fnmatchcase(weight.name, self.weights)]
        if len(named) != 1:
            names = [weight.name for weight in quantized_weights(model)]
            raise TargetError(f"{self.weights!r} names {len(named)} of the one-bit weights {names}; expected one")
        latent = named[0].latent
        statistics = PairStatistics(Dense(), latent.shape, torch.float64, latent.device)
        for y, x in batches:
            outputs, inputs = block_pairs(y, x)
            statistics.add(inputs, outputs)
        if sum_over_ranks is not None:
            statistics.reduce(sum_over_ranks)
        (group,) = statistics.groups
        gram, cross, magnitude = group.gram[0], group.cross[0], latent.shape[1] ** -0.5
        boxed = box_least_squares(gram, cross, magnitude)
        signs = torch.where(boxed >= 0, 1.0, -1.0).to(boxed)
        for _ in range(FLIP_ROUNDS):
            flipped = flip_one_sign_a_row(signs, gram, cross, magnitude)
            if torch.equal(flipped, signs):
                break
            signs = flipped
        latent.copy_(one_bit_latent(signs, boxed, magnitude))
        global_scale(model).set(magnitude)
