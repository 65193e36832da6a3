"""HiddenLISTA: an unrolled sparse coder with a hidden state, for one-dimensional signals."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_modules.operators.subsampled import dct
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["HiddenLISTA"]


@records_arguments
class HiddenLISTA(nn.Module):
    r"""Separates an additive artifact from a signal by unrolled sparse coding in learned features.

    The noisy epoch m is cut into frames of `stride` samples, and C takes the orthonormal cosine transform (DCT-II) of
    each, of which the lowest `frequencies` are kept: C m is a signal of as many channels. From z = 0 and an artifact
    e = 0,

    .. math::
        z \leftarrow \mathrm{relu}\big(z + P(s_k S_k z) + W_k (a_k \odot (C m - e)) - \theta_k\big), \quad
        e \leftarrow e + b_k \odot D_k z, \quad k = 1 \dots K, \qquad \hat x = m - C^T e.

    W, S and D are convolutions over the frames; S works in `groups` separate groups of channels, and the fixed
    permutation P deals the channels out to the groups anew (as in ShuffleNet). The first layer has no S, its state
    being zero. It is LISTA (Gregor and LeCun, "Learning Fast Approximations of Sparse Coding", ICML 2010) with weights
    of its own in each layer, a nonnegative code and S beside the residual: each layer sees what the dictionaries before
    it have left, and mends it.

    C is the physics: neither eye movements nor most of the EEG reach beyond the lowest frequencies, and both fall with
    frequency f = 1, 2, ... `frequencies`, eye movements faster. The gains a and b, one for each layer and frequency,
    let weights of one magnitude see all frequencies, and write less into the high ones than into the low. Layers go
    from coarse to fine: the input gains start at f in the first layer, which whitens the spectrum roughly, and at a
    constant in the last, since what is left is whiter than what there was; the output gains start at f⁻³ in the first
    and at f⁻¹ in the last, and fall with k^(-1/2). These exponents follow gains learned from the EEG of EEGdenoiseNet.

    The weights of the convolutions, `*_convolution*.weight`, hold structural weights only: a group is stored as its
    block. The scalars a, b and s are explicit step sizes. They let layers differ in scale when all weights share one.

    Args:
        channels: Channels of the state z; a multiple of `groups`.
        layers: Number K of iterations.
        kernel_size: Length of the convolutions, in frames; odd.
        stride: Samples of a frame.
        frequencies: Kept of a frame's transform; at most `stride`. What an artifact has beyond them is left as it is:
            the default is for eye movements, muscles need all.
        groups: Channel groups of S.
        step_sizes: Whether gains and step sizes are learned. If not, they stay where they start, known from the sizes
            of the network, and are in no checkpoint or file.

    Raises:
        ValueError: If an argument is out of range, or, by `forward`, if the input is not (batch, samples) with samples
            a multiple of `stride`.

    Example:
        >>> solver = HiddenLISTA(channels=8, layers=3, stride=4, frequencies=2, groups=2)
        >>> solver(torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """

    basis: Tensor
    input_gains: Tensor
    output_gains: Tensor
    state_step_sizes: Tensor

    def __init__(
        self,
        channels: int = 64,
        layers: int = 10,
        kernel_size: int = 9,
        stride: int = 16,
        frequencies: int = 6,
        groups: int = 4,
        step_sizes: bool = True,
    ) -> None:
        super().__init__()
        if (
            min(channels, layers, kernel_size, stride, frequencies, groups) < 1
            or channels % groups
            or kernel_size % 2 == 0
            or frequencies > stride
        ):
            raise ValueError(
                f"channels={channels}, layers={layers}, kernel_size={kernel_size}, stride={stride}, "
                f"frequencies={frequencies}, groups={groups}: all must be positive, kernel_size odd, channels a "
                "multiple of groups, and frequencies at most the stride."
            )
        self.stride, self.groups = stride, groups
        self.register_buffer("basis", dct(torch.eye(stride))[:, :frequencies].contiguous(), persistent=False)
        self.input_convolutions = nn.ModuleList(_convolution(frequencies, channels, kernel_size) for _ in range(layers))
        self.state_convolutions = nn.ModuleList(
            _convolution(channels, channels, kernel_size, groups) for _ in range(layers - 1)
        )
        self.output_convolutions = nn.ModuleList(
            _convolution(channels, frequencies, kernel_size) for _ in range(layers)
        )
        self.thresholds = nn.Parameter(torch.full((layers, channels, 1, 1), 0.05))
        for name, value in self._initialised(frequencies).items():
            if step_sizes:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def _initialised(self, frequencies: int) -> dict[str, Tensor]:
        """Draw normal weights, all of one deviation: they can share one scale later on. Return the step sizes.

        These give a convolution of white input the gain 0.5 from the lowest frequency to the state, 0.8 within the
        state, and 0.4 from the state to the lowest frequency, in the first layer.
        """
        layers = len(self.thresholds)
        inputs, states = (
            convolutions[0].get_parameter("weight")[0].numel()
            for convolutions in (self.input_convolutions, self.output_convolutions)
        )
        deviation = math.sqrt(self.groups / states)
        for convolution in (*self.input_convolutions, *self.state_convolutions, *self.output_convolutions):
            convolution.get_parameter("weight").normal_(std=deviation)
        whitening, spectrum = _coarse_to_fine(layers, frequencies)
        return {
            "input_gains": 0.5 / math.sqrt(inputs) / deviation * whitening,
            "output_gains": 0.4 / math.sqrt(states) / deviation * spectrum,
            "state_step_sizes": torch.full((layers - 1,), 0.8),
        }

    def forward(self, noisy: Tensor) -> Tensor:
        """Estimate the clean epochs.

        Args:
            noisy: Epochs m, shape (batch, samples).

        Returns:
            The estimates, shape (batch, samples).
        """
        if noisy.ndim != 2 or noisy.shape[1] == 0 or noisy.shape[1] % self.stride:
            raise ValueError(
                f"noisy has shape {tuple(noisy.shape)}: it must be (batch, samples) with samples a positive multiple "
                f"of the stride, {self.stride}."
            )
        # A view in channels-last layout, which every operation below keeps.
        spectra = (noisy.unflatten(1, (1, -1, self.stride)) @ self.basis).permute(0, 3, 1, 2)
        state = torch.relu(self._input(0, spectra) - self.thresholds[0])
        residual = spectra - self._output(0, state)
        for layer in range(1, len(self.thresholds)):
            state = state + self._input(layer, residual) + self._shuffled_state(layer - 1, state)
            state = torch.relu(state - self.thresholds[layer])
            residual = residual - self._output(layer, state)
        artifact = (spectra - residual).permute(0, 2, 3, 1) @ self.basis.T
        return noisy - artifact.flatten(1)

    def _input(self, layer: int, residual: Tensor) -> Tensor:
        return self.input_convolutions[layer](self.input_gains[layer].view(-1, 1, 1) * residual)

    def _output(self, layer: int, state: Tensor) -> Tensor:
        return self.output_gains[layer].view(-1, 1, 1) * self.output_convolutions[layer](state)

    def _shuffled_state(self, layer: int, state: Tensor) -> Tensor:
        convolved = self.state_step_sizes[layer] * self.state_convolutions[layer](state)
        last = convolved.permute(0, 2, 3, 1).unflatten(3, (self.groups, -1)).transpose(3, 4).flatten(3)
        return last.permute(0, 3, 1, 2)


def _convolution(channels_in: int, channels_out: int, kernel_size: int, groups: int = 1) -> nn.Conv2d:
    """Return a convolution along time, of height 1: torch's fast channels-last path on CPUs is two-dimensional."""
    size, padding = (1, kernel_size), (0, kernel_size // 2)
    return nn.Conv2d(channels_in, channels_out, size, padding=padding, groups=groups, bias=False)


def _coarse_to_fine(layers: int, frequencies: int) -> tuple[Tensor, Tensor]:
    """Return how the input and the output gains start, relative to those of the first layer and lowest frequency."""
    layer, frequency = torch.arange(1.0, layers + 1).unsqueeze(1), torch.arange(1.0, frequencies + 1)
    fineness = (layer - 1) / max(layers - 1, 1)
    whitening = frequency ** (1 - fineness) * (frequencies / 2) ** fineness
    return whitening, layer**-0.5 * frequency ** (2 * fineness - 3)
