"""Convolutions on packed signs: the kernel looks sums of inputs up by the bits, with no unpacked weight in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.kernel import native
from pibinn_plugin.kernel.operators import CONVOLUTION
from pibinn_plugin.unpack_signs import PackedLayer


class _Convolves(PackedLayer):
    """A convolution on packed signs, in inference; in all else, and where floats are faster, one with W."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    in_channels: int
    out_channels: int
    groups: int
    padding_mode: str

    @override
    def forward(self, input: Tensor) -> Tensor:
        output = None if torch.is_grad_enabled() else self._convolved(input)
        return super().forward(input) if output is None else output

    def _convolved(self, input: Tensor) -> Tensor | None:
        """One call of the kernel; None for what it does not take: torch convolves that, or says what is wrong."""
        chain = self._plain_chain()
        kernel, padding = self.kernel_size, self.padding
        if (
            chain is None
            or "bias" not in self._parameters  # parametrized
            or isinstance(padding, str)
            or self.padding_mode != "zeros"
            or input.dtype is not torch.float32
            or input.ndim != 2 + len(kernel)
            or input.shape[1] != self.in_channels
            or torch._C._is_any_autocast_enabled()
        ):
            return None
        bits, bias = chain._buffers["original"], self._parameters["bias"]
        scale = chain._modules["0"]._scale[0]._parameters["value"]
        axes = zip(input.shape[2:], kernel, padding, self.dilation, strict=True)
        fits = all(size + 2 * pad > dilation * (width - 1) for size, width, pad, dilation in axes)
        if not fits or not native.can_run(input, bits, scale, bias) or not self._is_faster(input):
            return None
        return CONVOLUTION(
            input, bits, scale, self.out_channels, kernel, self.stride, padding, self.dilation, self.groups, bias
        )

    def _is_faster(self, input: Tensor) -> bool:
        """Whether looking sums up is faster than the convolution of floats, as measured on Zen 3.

        Finding the inputs of a position and building tables of their sums takes as long as the lookups of two dozen
        outputs, for 32 inputs as for fewer. Torch has fast loops for images whose channels lie side by side, which are
        slow to start: few outputs pay only where there are few positions.
        """
        width = math.prod(self.kernel_size)
        inputs, outputs = self.in_channels // self.groups * width, self.out_channels // self.groups
        is_channels_last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
        if input.is_contiguous() or not is_channels_last:
            return inputs >= 48
        is_small = len(input) * math.prod(input.shape[2:]) <= 512
        return width > 1 and (inputs >= 48 if is_small else inputs >= 144 and outputs >= 64)


class PackedConv1d(_Convolves, nn.Conv1d):  # type: ignore[misc]  # whose attributes are those above
    """``nn.Conv1d`` on packed signs."""


class PackedConv2d(_Convolves, nn.Conv2d):  # type: ignore[misc]
    """``nn.Conv2d`` on packed signs."""
