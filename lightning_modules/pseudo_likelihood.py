"""The pseudo-likelihood of spins: how well their local fields predict each of them from all the others.

A pure function, and a thin metric and a loss around it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

__all__ = ["PseudoLikelihood", "PseudoLikelihoodLoss", "negative_log_pseudo_likelihood"]


def negative_log_pseudo_likelihood(fields: Tensor, spins: Tensor) -> Tensor:
    r"""The negative logarithm of the probability of every spin given all others, in nats.

    .. math:: -\log P(s_i \mid s_{j \neq i}) = \log(1 + e^{-2 s_i h_i}), \qquad h_i = \sum_j W_{ij} s_j

    Its sum over spins and samples is convex in W. Besag, "Statistical analysis of non-lattice data", The Statistician
    24, 1975; for couplings from few samples Lokhov et al., "Optimal structure and parameter learning of Ising models",
    Science Advances 4, 2018.

    Args:
        fields: h, any shape; the inverse temperature is a part of them.
        spins: -1 or 1, the same shape.

    Returns:
        One value a spin, in the shape of the spins.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> negative_log_pseudo_likelihood(torch.tensor([0.0, 1.0]), torch.tensor([1.0, -1.0]))
        tensor([0.6931, 2.1269])
    """
    if fields.shape != spins.shape:
        raise ValueError(f"fields has shape {tuple(fields.shape)} and spins {tuple(spins.shape)}: they must be equal")
    return F.softplus(-2 * spins * fields)


class PseudoLikelihood(MeanMetric):
    """Mean over spins and samples of :func:`negative_log_pseudo_likelihood`, in nats a spin; ln 2 without knowledge.

    `update(preds, target)` takes fields and spins of one shape and raises a ValueError if theirs differ.

    Example:
        >>> metric = PseudoLikelihood()
        >>> metric(torch.zeros(2, 4, 4), torch.ones(2, 4, 4))
        tensor(0.6931)
    """

    is_differentiable = True  # type: ignore[assignment]
    higher_is_better = False  # type: ignore[assignment]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nan_strategy="disable", **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Add the spins of a batch of samples."""
        super().update(negative_log_pseudo_likelihood(preds, target))


class PseudoLikelihoodLoss(nn.Module):
    """Mean of :func:`negative_log_pseudo_likelihood`, as a training loss of fields and spins.

    `forward(preds, target)` raises a ValueError if the shapes differ.

    Example:
        >>> PseudoLikelihoodLoss()(torch.zeros(2, 4, 4), torch.ones(2, 4, 4))
        tensor(0.6931)
    """

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        return negative_log_pseudo_likelihood(preds, target).mean()
