"""Convolutions on packed signs: the kernel looks sums of inputs up by the bits, with no unpacked weight in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.kernel import native
from pibinn_plugin.kernel.operators import CONVOLUTION
from pibinn_plugin.structure.base import is_known
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
    _layout: tuple[int, int]  # outputs, and inputs of each
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    @override
    def forward(self, input: Tensor) -> Tensor:
        chain: Any = None if torch.is_grad_enabled() else self._plain_chain()
        if chain is not None and "bias" in self._parameters:
            bits, rule, bias = chain._buffers["original"], chain._modules["0"], self._parameters["bias"]
            scale = rule._scale[0]._parameters["value"]
            if self._is_faster(input) and self._can_look_up(input, bits, scale, bias):
                geometry = self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, self.groups
                return CONVOLUTION(input, bits, scale, *geometry, bias)
            weight = rule.kept_weight(bits)
            if weight is not None:  # what follows would read it, in twice the time
                return self._conv_forward(input, weight, bias)
        return super().forward(input)

    def _can_look_up(self, input: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
        """Whether the kernel takes all this; torch convolves the rest, or says what is wrong with it.

        Written out: of a small convolution this takes half of the time.
        """
        kernel, padding = self.kernel_size, self.padding
        if (
            input.dtype is not torch.float32
            or input.dim() != 2 + len(kernel)
            or input.shape[1] != self.in_channels
            or isinstance(padding, str)
            or self.padding_mode != "zeros"
            or not native.can_run(input, bits, scale, bias)
            or torch._C._is_any_autocast_enabled()
        ):
            return False
        for size, width, pad, dilation in zip(input.shape[2:], kernel, padding, self.dilation, strict=True):
            if size + 2 * pad <= dilation * (width - 1):
                return False
        return True

    def _is_faster(self, input: Tensor) -> bool:
        """Whether looking sums up is faster than the convolution of floats, as measured on Zen 3.

        Finding the inputs of a position and building tables of their sums takes as long as the lookups of two dozen
        outputs, for 32 inputs as for fewer. Torch convolves few positions slowly, for few outputs or many, and long
        kernels of one dimension. It has fast loops for images whose channels lie side by side, slow to start likewise.
        """
        (outputs, inputs), kernel = self._layout, self.kernel_size
        outputs //= self.groups
        if inputs < 48:
            return False
        is_pointwise = inputs == self.in_channels // self.groups
        if input.is_contiguous() or input.dim() != 4 or not input.is_contiguous(memory_format=torch.channels_last):
            if (
                outputs >= (64 if is_pointwise else 40)
                or (len(kernel) == 1 and kernel[0] >= 9)
                or max(self.dilation) > 1
            ):
                return True
            return not is_pointwise and is_known(input.numel() <= 1024 * self.in_channels)
        if is_pointwise:
            return False
        return is_known(input.numel() <= 512 * self.in_channels) or (inputs >= 144 and outputs >= 64)


class PackedConv1d(_Convolves, nn.Conv1d):  # type: ignore[misc]  # whose attributes are those above
    """``nn.Conv1d`` on packed signs: input ``(batch, channels, samples)``, output ``(batch, outputs, positions)``."""


class PackedConv2d(_Convolves, nn.Conv2d):  # type: ignore[misc]
    """``nn.Conv2d`` on packed signs: input ``(batch, channels, rows, columns)``, output likewise.

    Example:
        >>> import pibinn_plugin as pb
        >>> packed = pb.convert(pb.prepare(nn.Sequential(nn.Conv2d(16, 8, 3)), {"0.weight": None}))
        >>> with torch.no_grad():
        ...     isinstance(packed[0], PackedConv2d), packed(torch.zeros(2, 16, 9, 7)).shape
        (True, torch.Size([2, 8, 7, 5]))
    """
