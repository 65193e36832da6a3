"""HiddenLISTA: an unrolled sparse coder with a hidden state, for one-dimensional signals."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["HiddenLISTA"]


class HiddenLISTA(nn.Module):
    r"""Separates an additive artifact from a signal by unrolled sparse coding in learned features.

    The noisy epoch m is rearranged into `stride` phases u, each sampled at every `stride`-th point. From z = 0,

    .. math::
        z \leftarrow \mathrm{relu}(z + P(s_k S_k z) + w_k W_k u - \theta_k), \quad k = 1 \dots K, \qquad
        \hat x = m - d D z,

    where D z, back in the order of samples, is the artifact. W, S and D are convolutions over the phases; S works in
    `groups` separate groups of channels, and the fixed permutation P deals the channels out to the groups anew (as in
    ShuffleNet). The first layer has no S, its state being zero. It is LISTA (Gregor and LeCun, "Learning Fast
    Approximations of Sparse Coding", ICML 2010) with weights of its own in each layer, a nonnegative code and I - W A
    replaced by I + S.

    The weights of the convolutions, `*_convolution*.weight`, hold structural weights only: a group is stored as its
    block. The scalars s, w, d are explicit step sizes. They let layers differ in scale when all weights share one.

    Args:
        channels: Channels of the state z; a multiple of `groups`.
        layers: Number K of iterations.
        kernel_size: Length of the convolutions over the phases; odd.
        stride: Number of phases.
        groups: Channel groups of S.
        step_sizes: Whether there are step sizes; without, they are 1 throughout.

    Raises:
        ValueError: If an argument is out of range, or, by `forward`, if the input is not (batch, samples) with samples
            a multiple of `stride`.

    Example:
        >>> solver = HiddenLISTA(channels=8, layers=3, stride=4, groups=2)
        >>> solver(torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        channels: int = 88,
        layers: int = 6,
        kernel_size: int = 9,
        stride: int = 16,
        groups: int = 4,
        step_sizes: bool = True,
    ) -> None:
        super().__init__()
        if min(channels, layers, kernel_size, stride, groups) < 1 or channels % groups or kernel_size % 2 == 0:
            raise ValueError(
                f"channels={channels}, layers={layers}, kernel_size={kernel_size}, stride={stride}, groups={groups}: "
                "all must be positive, kernel_size odd, and channels a multiple of groups."
            )
        self.stride = stride
        self.groups = groups
        self.input_convolutions = nn.ModuleList(_convolution(stride, channels, kernel_size) for _ in range(layers))
        self.state_convolutions = nn.ModuleList(
            _convolution(channels, channels, kernel_size, groups) for _ in range(layers - 1)
        )
        self.output_convolution = _convolution(channels, stride, kernel_size)
        self.thresholds = nn.Parameter(torch.full((layers, channels, 1, 1), 0.05))
        self.input_step_sizes = self._step_sizes(layers, step_sizes)
        self.state_step_sizes = self._step_sizes(layers - 1, step_sizes)
        self.output_step_size = self._step_sizes(1, step_sizes)
        self._initialise()

    def _step_sizes(self, count: int, learned: bool) -> nn.Parameter | None:
        return nn.Parameter(torch.ones(count)) if learned else None

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw normal weights of gain 0.5 (input) and 0.3 (state, output).

        With step sizes, all weights get the deviation of those of S and the step sizes make up for it: weights of one
        magnitude can share one scale later on.
        """
        fan_in_state = self.output_convolution.weight[0].numel() // self.groups
        for convolutions, steps, gain in (
            (self.input_convolutions, self.input_step_sizes, 0.5),
            (self.state_convolutions, self.state_step_sizes, 0.3),
            (nn.ModuleList([self.output_convolution]), self.output_step_size, 0.3),
        ):
            for number, convolution in enumerate(convolutions):
                weight = convolution.get_parameter("weight")
                deviation = gain / math.sqrt(weight[0].numel())
                if steps is not None:
                    steps[number] = deviation * math.sqrt(fan_in_state)
                    deviation = 1 / math.sqrt(fan_in_state)
                weight.normal_(std=deviation)

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
        phases = noisy.unflatten(1, (1, -1, self.stride)).permute(0, 3, 1, 2)
        state = torch.relu(self._input(0, phases) - self.thresholds[0])
        for layer in range(1, len(self.input_convolutions)):
            state = state + self._input(layer, phases) + self._shuffled_state(layer - 1, state)
            state = torch.relu(state - self.thresholds[layer])
        artifact = self.output_convolution(state)
        if self.output_step_size is not None:
            artifact = self.output_step_size * artifact
        return noisy - artifact.permute(0, 2, 3, 1).flatten(1)

    def _input(self, layer: int, phases: Tensor) -> Tensor:
        # The step size multiplies the phases, of which there are fewer than channels.
        if self.input_step_sizes is not None:
            phases = self.input_step_sizes[layer] * phases
        return self.input_convolutions[layer](phases)

    def _shuffled_state(self, layer: int, state: Tensor) -> Tensor:
        convolved = self.state_convolutions[layer](state)
        if self.state_step_sizes is not None:
            convolved = self.state_step_sizes[layer] * convolved
        last = convolved.permute(0, 2, 3, 1).unflatten(3, (self.groups, -1)).transpose(3, 4).flatten(3)
        return last.permute(0, 3, 1, 2)


def _convolution(channels_in: int, channels_out: int, kernel_size: int, groups: int = 1) -> nn.Conv2d:
    """Return a convolution along time, of height 1: torch's fast channels-last path on CPUs is two-dimensional."""
    size, padding = (1, kernel_size), (0, kernel_size // 2)
    return nn.Conv2d(channels_in, channels_out, size, padding=padding, groups=groups, bias=False)
