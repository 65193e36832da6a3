"""Metrics of sparse recovery, of couplings and of EEG denoising that torchmetrics lacks.

Each metric is a pure function and a thin :class:`torchmetrics.Metric` around it. Two averages are in use, and they
differ: :class:`NMSE` is a ratio of sums over all signals seen; the EEG metrics are computed for each epoch and then
averaged. :class:`RRMSELoss` trains on what :class:`RRMSETemporal` measures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

__all__ = [
    "NMSE",
    "CorrelationCoefficient",
    "RRMSELoss",
    "RRMSESpectral",
    "RRMSETemporal",
    "SignAccuracy",
    "correlation_coefficient",
    "nmse_db",
    "rrmse_spectral",
    "rrmse_temporal",
    "sign_accuracy",
]


def _checked(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse unequal shapes and complex values.

    Half-precision inputs are computed in float32, where neither sums nor spectra overflow.
    """
    if preds.shape != target.shape:
        raise ValueError(
            f"preds has shape {tuple(preds.shape)} and target has shape {tuple(target.shape)}: they must be equal."
        )
    if preds.is_complex() or target.is_complex():
        raise ValueError(f"preds is {preds.dtype} and target is {target.dtype}: both must be real.")
    dtype = torch.promote_types(torch.promote_types(preds.dtype, target.dtype), torch.float32)
    return preds.to(dtype), target.to(dtype)


def _checked_epochs(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As `_checked`, for signals with samples on the last axis."""
    preds, target = _checked(preds, target)
    if target.ndim == 0 or target.shape[-1] == 0:
        raise ValueError(f"preds and target have shape {tuple(target.shape)}: the last axis must hold samples.")
    return preds, target


def _relative_rms(preds: Tensor, target: Tensor) -> Tensor:
    # A ratio of norms equals the ratio of root mean squares: both are over the same number of values.
    return torch.linalg.vector_norm(preds - target, dim=-1) / torch.linalg.vector_norm(target, dim=-1)


def nmse_db(preds: Tensor, target: Tensor) -> Tensor:
    r"""Normalized mean squared error in dB, as a ratio of sums.

    .. math:: 10 \log_{10} \frac{\sum \lVert \hat x - x \rVert^2}{\sum \lVert x \rVert^2}

    The sums run over every element. This is the figure of the sparse recovery literature (Chen et al., "Theoretical
    Linear Convergence of Unfolded ISTA", NeurIPS 2018); averaging dB over signals gives another number.

    Args:
        preds: Estimates, any shape.
        target: True signals, the same shape.

    Returns:
        A scalar in dB; minus infinity for perfect estimates.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> nmse_db(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
        tensor(-10.4139)
    """
    preds, target = _checked(preds, target)
    return 10 * torch.log10((preds - target).square().sum() / target.square().sum())


def rrmse_temporal(preds: Tensor, target: Tensor) -> Tensor:
    r"""Relative root mean squared error of every epoch in time.

    .. math:: \frac{\mathrm{RMS}(\hat x - x)}{\mathrm{RMS}(x)}

    As in Zhang et al., "EEGdenoiseNet", Journal of Neural Engineering 18, 2021.

    Args:
        preds: Estimates, shape (..., samples).
        target: Clean epochs, the same shape; none may be zero throughout.

    Returns:
        One value an epoch, shape (...).

    Raises:
        ValueError: If the shapes differ or there are no samples.

    Example:
        >>> rrmse_temporal(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        tensor([0.2000, 1.0000])
    """
    return _relative_rms(*_checked_epochs(preds, target))


def rrmse_spectral(preds: Tensor, target: Tensor) -> Tensor:
    r"""Relative root mean squared error of every epoch between power spectra.

    .. math:: \frac{\mathrm{RMS}(P(\hat x) - P(x))}{\mathrm{RMS}(P(x))}, \qquad P(x) = |\mathrm{rfft}(x)|^2

    As in Zhang et al., "EEGdenoiseNet", Journal of Neural Engineering 18, 2021, with the one-sided periodogram of the
    whole epoch, without window or detrending, as power spectrum.

    Args:
        preds: Estimates, shape (..., samples).
        target: Clean epochs, the same shape; none may be zero throughout.

    Returns:
        One value an epoch, shape (...).

    Raises:
        ValueError: If the shapes differ or there are no samples.

    Example:
        >>> target = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
        >>> rrmse_spectral(2 * target, target)  # power grows by four, so the error is three times the power
        tensor([3.])
    """
    preds, target = _checked_epochs(preds, target)
    return _relative_rms(torch.fft.rfft(preds).abs().square(), torch.fft.rfft(target).abs().square())


def correlation_coefficient(preds: Tensor, target: Tensor) -> Tensor:
    r"""Pearson correlation of every epoch with its estimate.

    .. math:: \frac{\mathrm{Cov}(\hat x, x)}{\sqrt{\mathrm{Var}(\hat x)\,\mathrm{Var}(x)}}

    As in Zhang et al., "EEGdenoiseNet", Journal of Neural Engineering 18, 2021. A constant estimate says nothing of the
    epoch: its correlation is 0.

    Args:
        preds: Estimates, shape (..., samples).
        target: Clean epochs, the same shape.

    Returns:
        One value an epoch in [-1, 1], shape (...).

    Raises:
        ValueError: If the shapes differ or there are no samples.

    Example:
        >>> target = torch.tensor([[1.0, 2.0, 4.0]])
        >>> correlation_coefficient(5 - 3 * target, target)
        tensor([-1.])
    """
    preds, target = _checked_epochs(preds, target)
    preds = preds - preds.mean(dim=-1, keepdim=True)
    target = target - target.mean(dim=-1, keepdim=True)
    norms = torch.linalg.vector_norm(preds, dim=-1) * torch.linalg.vector_norm(target, dim=-1)
    correlation = (preds * target).sum(dim=-1) / torch.where(norms > 0, norms, torch.ones_like(norms))
    return correlation.clamp(-1, 1)


class NMSE(Metric):
    """Normalized mean squared error in dB over all signals seen, as a ratio of sums: see :func:`nmse_db`.

    `update(preds, target)` takes tensors of any one shape and raises a ValueError if theirs differ.

    Example:
        >>> metric = NMSE()
        >>> metric.update(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
        >>> metric.update(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 1.0]))
        >>> metric.compute()
        tensor(-10.4139)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    error_energy: Tensor
    signal_energy: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("error_energy", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("signal_energy", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the energies of a batch of errors and of signals."""
        preds, target = _checked(preds, target)
        self.error_energy += (preds - target).square().sum()
        self.signal_energy += target.square().sum()

    def compute(self) -> Tensor:
        """Return the ratio of all energies so far, in dB."""
        return 10 * torch.log10(self.error_energy / self.signal_energy)


def sign_accuracy(preds: Tensor, target: Tensor) -> Tensor:
    """The fraction of nonzero values whose sign is found; where an estimate is 0, it is not.

    Args:
        preds: Estimates, any shape.
        target: True values, the same shape; those that are 0 are left out, and not all may be.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> sign_accuracy(torch.tensor([0.1, -2.0, 0.0, 7.0]), torch.tensor([3.0, -1.0, 1.0, 0.0]))
        tensor(0.6667)
    """
    preds, target = _checked(preds, target)
    return (preds.sign() == target.sign())[target != 0].float().mean()


class SignAccuracy(Metric):
    """Fraction of all nonzero values seen whose sign is found: see :func:`sign_accuracy`.

    `update(preds, target)` takes tensors of any one shape and raises a ValueError if theirs differ.

    Example:
        >>> metric = SignAccuracy()
        >>> metric(torch.tensor([0.1, -2.0, 0.0]), torch.tensor([3.0, -1.0, 1.0]))
        tensor(0.6667)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    found: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("found", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of estimates and true values."""
        preds, target = _checked(preds, target)
        is_counted = target != 0
        self.found += (preds.sign() == target.sign())[is_counted].sum()
        self.count += is_counted.sum()

    def compute(self) -> Tensor:
        """Return the fraction over all values so far."""
        return self.found / self.count


class _MeanOverEpochs(MeanMetric):
    """Mean over epochs of what `per_epoch` gives for each."""

    is_differentiable = True  # type: ignore[assignment]
    higher_is_better = False  # type: ignore[assignment]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nan_strategy="disable", **kwargs)  # an epoch without a value is not left out in silence

    @staticmethod
    def per_epoch(preds: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Add a batch of epochs, shape (..., samples)."""
        super().update(self.per_epoch(preds, target))


class RRMSETemporal(_MeanOverEpochs):
    """Mean over epochs of :func:`rrmse_temporal`.

    `update(preds, target)` takes tensors of shape (..., samples) and raises a ValueError if their shapes differ.

    Example:
        >>> metric = RRMSETemporal()
        >>> metric(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        tensor(0.6000)
    """

    per_epoch = staticmethod(rrmse_temporal)


class RRMSESpectral(_MeanOverEpochs):
    """Mean over epochs of :func:`rrmse_spectral`.

    `update(preds, target)` takes tensors of shape (..., samples) and raises a ValueError if their shapes differ.

    Example:
        >>> metric = RRMSESpectral()
        >>> target = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
        >>> metric(2 * target, target)
        tensor(3.)
    """

    per_epoch = staticmethod(rrmse_spectral)


class CorrelationCoefficient(_MeanOverEpochs):
    """Mean over epochs of :func:`correlation_coefficient`.

    `update(preds, target)` takes tensors of shape (..., samples) and raises a ValueError if their shapes differ.

    Example:
        >>> metric = CorrelationCoefficient()
        >>> target = torch.tensor([[1.0, 2.0, 4.0]])
        >>> metric(torch.cat([5 - 3 * target, target]), torch.cat([target, target]))
        tensor(0.)
    """

    higher_is_better = True
    per_epoch = staticmethod(correlation_coefficient)


class RRMSELoss(nn.Module):
    """Mean over the epochs of a batch of :func:`rrmse_temporal`, as a training loss.

    In noisy epochs of unit power the clean part is the smaller the lower the SNR, so the mean squared error counts
    epochs of low SNR less; this loss weighs every epoch alike.

    `forward(preds, target)` takes tensors of shape (..., samples) and raises a ValueError if their shapes differ.

    Example:
        >>> RRMSELoss()(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        tensor(0.6000)
    """

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        return rrmse_temporal(preds, target).mean()
