"""ConvolutionalLISTA: unrolled convolutional sparse coding of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.operators.subsampled import dct
from lightning_modules.solvers.proximal import soft_threshold
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["ConvolutionalLISTA"]

_REGULARIZATION = 0.1  # of the start, about the noise deviation 25/255


@records_arguments
class ConvolutionalLISTA(nn.Module):
    r"""Denoising of images by K iterations of convolutional sparse coding, with filters W_k and D_k each.

    .. math::
        z \leftarrow \mathrm{soft}(z + g_k W_k * (y - d_{k-1} D_{k-1} * z), |\theta_k|), \quad k = 1 \dots K, \qquad
        \hat x = d_K D_K * z,

    from z = 0 (Sreter and Giryes, "Learned Convolutional Sparse Coding", ICASSP 2018, here with weights of its own in
    each iteration). The filters start at the lowest frequencies of the orthonormal cosine transform of patches, divided
    by `kernel_size` so that the dictionary has norm 1 at most, and W at the adjoint of D: the untrained solver is ISTA
    for that dictionary. All weights lie in ``nn.Conv2d`` layers, each convolution with zeros around the image.

    Args:
        channels: of the code z; at most ``kernel_size²``.
        layers: K.
        kernel_size: height and width of the filters; odd.

    Raises:
        ValueError: an argument out of range; or, by ``forward``, images that are not (batch, 1, height, width).

    Example:
        >>> solver = ConvolutionalLISTA(channels=9, layers=2, kernel_size=3)
        >>> solver(torch.zeros(5, 1, 16, 12)).shape
        torch.Size([5, 1, 16, 12])
    """

    def __init__(self, channels: int = 49, layers: int = 6, kernel_size: int = 7) -> None:
        super().__init__()
        if min(channels, layers, kernel_size) < 1 or kernel_size % 2 == 0 or channels > kernel_size**2:
            raise ValueError(
                f"channels={channels}, layers={layers}, kernel_size={kernel_size}: all must be positive, kernel_size "
                f"odd, and channels at most kernel_size², {kernel_size**2}"
            )
        atoms = _cosine_atoms(kernel_size)[:channels] / kernel_size
        self.analysis_convolutions = nn.ModuleList(_convolution(atoms[:, None]) for _ in range(layers))
        # The adjoint of a convolution with odd kernels and zeros around the image is that with the kernels reversed.
        synthesis = atoms.flip(1, 2)[None]
        self.synthesis_convolutions = nn.ModuleList(_convolution(synthesis) for _ in range(layers))
        self.analysis_step_sizes = nn.Parameter(torch.ones(layers))
        self.synthesis_step_sizes = nn.Parameter(torch.ones(layers))
        self.thresholds = nn.Parameter(torch.full((layers, channels, 1, 1), _REGULARIZATION / kernel_size))

    def forward(self, y: Tensor) -> Tensor:
        """Estimate the clean images.

        Args:
            y: noisy grey images, shape ``(batch, 1, height, width)``.

        Returns:
            The estimates, the same shape.
        """
        if y.dim() != 4 or y.shape[1] != 1:
            raise ValueError(f"y has shape {tuple(y.shape)}; expected grey images (batch, 1, height, width)")
        z = soft_threshold(self._analysed(0, y), self.thresholds[0].abs())
        for number in range(1, len(self.analysis_convolutions)):
            correction = self._analysed(number, y - self._synthesised(number - 1, z))
            z = soft_threshold(z + correction, self.thresholds[number].abs())
        return self._synthesised(-1, z)

    def _analysed(self, number: int, image: Tensor) -> Tensor:
        return self.analysis_step_sizes[number] * self.analysis_convolutions[number](image)

    def _synthesised(self, number: int, z: Tensor) -> Tensor:
        return self.synthesis_step_sizes[number] * self.synthesis_convolutions[number](z)


def _cosine_atoms(size: int) -> Tensor:
    """The orthonormal basis of patches, shape (size², size, size), from low to high frequency."""
    waves = dct(torch.eye(size)).T
    atoms = torch.einsum("ia,jb->ijab", waves, waves).flatten(0, 1)
    frequency = torch.arange(size)
    return atoms[(frequency[:, None] + frequency).flatten().argsort(stable=True)]


def _convolution(kernels: Tensor) -> nn.Conv2d:
    channels_out, channels_in, size, _ = kernels.shape
    convolution = nn.Conv2d(channels_in, channels_out, size, padding=size // 2, bias=False)
    convolution.weight = nn.Parameter(kernels.clone(memory_format=torch.contiguous_format))
    return convolution
