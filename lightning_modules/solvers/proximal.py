"""Proximal maps of sparsity penalties: what an unrolled solver applies to the end of each iteration."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["firm_threshold", "soft_threshold"]


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """The proximal map of ``threshold · ‖x‖₁``: ``sign(x) max(|x| - threshold, 0)``, for a threshold of at least 0.

    Args:
        x: any shape.
        threshold: broadcasts with ``x``.

    Example:
        >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), torch.tensor(1.0))
        tensor([-1.,  0.,  2.])
    """
    return torch.relu(x - threshold) - torch.relu(-x - threshold)


def firm_threshold(x: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
    r"""Firm shrinkage, which leaves large values as they are: the proximal map of the minimax concave penalty.

    .. math:: \mathrm{sign}(x) \min\left(|x|, \tfrac{1 + w}{w} \max(|x| - t, 0)\right)

    Zero up to the threshold t, the identity from t (1 + w) on, and linear between (Gao and Bruce, "WaveShrink with firm
    shrinkage", Statistica Sinica 7, 1997). For w to infinity it is `soft_threshold`, for w to 0 the hard threshold.

    Args:
        x: any shape.
        threshold: t, at least 0; broadcasts with ``x``.
        width: w, above 0; broadcasts with ``x``.

    Example:
        >>> firm_threshold(torch.tensor([-3.0, 0.5, 1.5]), torch.tensor(1.0), torch.tensor(1.0))
        tensor([-3.0000,  0.0000,  1.0000])
    """
    # As a factor of x: half the operations of sign and minimum. Where |x| is that small, the result is 0 or x anyway.
    magnitude = x.abs().clamp_min(torch.finfo(x.dtype).eps)
    return x * ((1 - threshold / magnitude) * ((1 + width) / width)).clamp(0, 1)
