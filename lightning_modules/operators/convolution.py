"""CircularConvolution: blur of signals or images with periodic boundaries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.operators.base import check_size
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["CircularConvolution"]


@records_arguments
class CircularConvolution(nn.Module):
    r"""Convolution of a signal or an image with a known kernel, periodic at the boundaries, by FFT.

    .. math:: (A x)_i = \sum_j h_j \, x_{(i - j) \bmod n}

    The origin of the kernel h is its middle element, so that a symmetric blur shifts nothing. Unknowns and measurements
    are rows: an image is flattened, its last axis fastest.

    Args:
        kernel: h, shape ``(length,)`` or ``(height, width)``, odd lengths.
        size: n, of the signal ``(samples,)`` or the image ``(height, width)``, at least those of the kernel.

    Raises:
        ValueError: a kernel of other dimensions, of an even length or longer than the signal, or not real and finite;
            by ``A`` and ``A_adjoint``, a wrong size.

    Example:
        >>> operator = CircularConvolution(kernel=[0.25, 0.5, 0.25], size=[6])
        >>> operator.A(torch.tensor([4.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
        tensor([2., 1., 0., 0., 0., 1.])
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor | Sequence[float] | Sequence[Sequence[float]], size: Sequence[int]) -> None:
        super().__init__()
        values = torch.as_tensor(kernel)
        values = values if values.is_floating_point() or values.is_complex() else values.float()
        fits = len(size) == values.dim() in (1, 2) and all(
            length % 2 == 1 and length <= limit for length, limit in zip(values.shape, size, strict=True)
        )
        if not fits or values.is_complex() or not values.isfinite().all():
            raise ValueError(
                f"a kernel of shape {tuple(values.shape)} for a signal of size {tuple(size)}: expected one or two "
                f"dimensions, the same of both, and a real, finite kernel of odd lengths, none above that of the signal"
            )
        self.size, self.shape = tuple(size), (math.prod(size), math.prod(size))
        self.register_buffer("kernel", values, persistent=False)

    def A(self, x: Tensor) -> Tensor:
        """``A x``: ``(..., unknowns)`` to ``(..., measurements)``."""
        return self._filtered(check_size(x, self.shape[1], "x"), self._transfer_function())

    def A_adjoint(self, y: Tensor) -> Tensor:
        """``Aᵀ y``: ``(..., measurements)`` to ``(..., unknowns)``, the correlation with the kernel."""
        return self._filtered(check_size(y, self.shape[0], "y"), self._transfer_function().conj())

    def _transfer_function(self) -> Tensor:
        axes = tuple(range(-len(self.size), 0))
        missing = [total - length for total, length in zip(self.size, self.kernel.shape, strict=True)]
        after = [pad for count in reversed(missing) for pad in (0, count)]  # F.pad begins with the last axis
        padded = F.pad(self.kernel, after)
        return torch.fft.rfftn(padded.roll([-(length // 2) for length in self.kernel.shape], axes), dim=axes)

    def _filtered(self, values: Tensor, transfer_function: Tensor) -> Tensor:
        axes = tuple(range(-len(self.size), 0))
        spectrum = torch.fft.rfftn(values.unflatten(-1, self.size), dim=axes) * transfer_function
        return torch.fft.irfftn(spectrum, s=self.size, dim=axes).flatten(-len(self.size))
