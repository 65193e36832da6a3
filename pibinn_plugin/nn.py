"""Compact float layers, which hold only their structural nonzeros, and the packed layers they convert to.

Use `BlockDiagonalLinear` or `BandedLinear` in place of ``nn.Linear`` with a mask: time and memory of training go with
the structural nonzeros, not with rows × columns. ``workflow.convert`` makes the packed layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin import native_kernel
from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.functional import packed_linear, packed_linear_adjoint, packed_linear_int8
from pibinn_plugin.native_kernel import Layout
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.structure import Banded, BlockDiagonal, Shape, Structure
from pibinn_plugin.structure.checkpoint import StructureInStateDict


class CompactLinear(nn.Module):
    """``y = W x + b`` with W stored as its structural nonzeros: the base of the compact layers.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        structure: where W may be nonzero.
        bias: whether there is a b.

    Raises:
        StructureError: the structure does not fit ``(out_features, in_features)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: Structure,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.structure = in_features, out_features, structure
        structure.check(self.dense_shape)
        self.weight = nn.Parameter(torch.empty(structure.compact_shape(self.dense_shape), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def dense_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.out_features, self.in_features

    def reset_parameters(self) -> None:
        """``nn.Linear``'s initialisation with the mean number of structural nonzeros of a row as its fan-in."""
        bound = 1 / math.sqrt(max(1.0, self.weight.numel() / self.out_features))
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return compact_linear(input, self.weight, self.structure, self.dense_shape, self.bias)

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.structure}, bias={self.bias is not None}"


def compact_layer(
    in_features: int,
    out_features: int,
    structure: Structure,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CompactLinear:
    """The compact layer of a structure: that of blocks and of bands, which every scheme knows, where it is one.

    Raises:
        StructureError: the structure does not fit ``(out_features, in_features)``.

    Example:
        >>> compact_layer(8, 4, BlockDiagonal(2)).weight.shape
        torch.Size([2, 2, 4])
    """
    if isinstance(structure, BlockDiagonal):
        return BlockDiagonalLinear(in_features, out_features, structure, bias, device, dtype)
    if isinstance(structure, Banded):
        return BandedLinear(in_features, out_features, structure.lower, structure.upper, bias, device, dtype)
    return CompactLinear(in_features, out_features, structure, bias, device, dtype)


def compact_linear(input: Tensor, weight: Tensor, structure: Structure, shape: Shape, bias: Tensor | None) -> Tensor:
    """``F.linear`` for a weight in compact form: input ``(..., columns)``, result ``(..., rows)``."""
    output = structure.linear(input, weight, shape)
    return output if bias is None else output + bias


class BlockDiagonalLinear(CompactLinear):
    """A linear layer whose weight is block-diagonal and stored as ``(blocks, rows, columns)``.

    Args:
        in_features: columns of the dense weight.
        out_features: rows of the dense weight.
        blocks: the number of equal blocks, or a `BlockDiagonal` for uneven or permuted ones.
        bias: whether there is a bias.

    Raises:
        StructureError: the blocks do not fit.

    Example:
        >>> layer = BlockDiagonalLinear(64, 32, 8)
        >>> layer.weight.shape, layer(torch.randn(5, 64)).shape
        (torch.Size([8, 4, 8]), torch.Size([5, 32]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int | BlockDiagonal,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        structure = BlockDiagonal(blocks) if isinstance(blocks, int) else blocks
        super().__init__(in_features, out_features, structure, bias, device, dtype)


class BandedLinear(CompactLinear):
    """A linear layer whose weight is banded and stored as its diagonals, one after the other.

    Args:
        in_features: columns of the dense weight.
        out_features: rows of the dense weight.
        lower: diagonals below the main one.
        upper: diagonals above it.
        bias: whether there is a bias.

    Raises:
        StructureError: the band does not fit.

    Example:
        >>> BandedLinear(6, 6, 1, 1).weight.shape
        torch.Size([16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        lower: int,
        upper: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, Banded(lower, upper), bias, device, dtype)


class _PackedLayer(StructureInStateDict, nn.Module):
    """What the packed layers share: the bits, an unregistered reference to λ, and the weight they stand for."""

    bits: Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: PackedSigns, scale: GlobalScale, bias: Tensor | None, compact: bool) -> None:
        super().__init__()
        self.structure, self.shape, self.compact = packed.structure, packed.shape, compact
        self.register_buffer("bits", packed.bits)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        self._scale = (scale,)

    @property
    def packed_signs(self) -> PackedSigns:
        """The packed weight."""
        return PackedSigns(self.bits, self.structure, self.shape)

    @property
    def weight(self) -> Tensor:
        """The weight as the layer had it before it was packed: dense, or compact. Unpacked at every access."""
        scale = self._scale[0]()
        return self.packed_signs.weight(scale, self.compact, scale.dtype)

    @override
    def extra_repr(self) -> str:
        return f"{self.structure}, shape={self.shape}, bias={self.bias is not None}"


class PackedLinear(_PackedLayer):
    """A linear layer on packed signs: ``y = λ (S ⊙ M) x + b``, input ``(..., columns)``, output ``(..., rows)``."""

    int8_activations = False  # how the layer runs, not what it is: in no state dict or file

    def __init__(self, packed: PackedSigns, scale: GlobalScale, bias: Tensor | None, compact: bool) -> None:
        super().__init__(packed, scale, bias, compact)
        structure = packed.structure
        is_permuted = isinstance(structure, BlockDiagonal) and structure.row_order is not None
        self._layout = None if is_permuted else native_kernel.layout_of(structure, packed.shape)

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.int8_activations:
            return packed_linear_int8(input, self.bits, self._scale[0](), self.structure, self.shape, self.bias)
        if self._layout is not None and "bias" in self._parameters and not torch.is_grad_enabled():
            output = self._fused(input, self._layout, self._parameters["bias"], False)
            if output is not None:
                return output
        return packed_linear(input, self.bits, self._scale[0](), self.structure, self.shape, self.bias)

    def adjoint(self, input: Tensor) -> Tensor:
        """``λ (S ⊙ M)ᵀ y``: input ``(..., rows)``, output ``(..., columns)``."""
        if self._layout is not None and not torch.is_grad_enabled():
            output = self._fused(input, self._layout, None, True)
            if output is not None:
                return output
        return packed_linear_adjoint(input, self.bits, self._scale[0](), self.structure, self.shape)

    def _fused(self, input: Tensor, layout: Layout, bias: Tensor | None, transposed: bool) -> Tensor | None:
        """One call of the kernel, λ's parameter and the bias with it; None where the kernel cannot run.

        More Python than this takes more time than a small product.
        """
        bits: Any = self._buffers["bits"]
        scale = self._scale[0].value
        if not native_kernel.can_run(input, bits, scale, bias):
            return None
        rows, columns = layout
        kind = type(rows)
        if kind is Tensor:
            rows, columns = native_kernel.as_arguments(layout, input)
        return native_kernel.FUSED[kind](input, bits, scale, rows, columns, bias, transposed)

    def stays_packed(self, input: Tensor) -> bool:
        """Whether products with this input multiply packed signs; elsewhere they unpack the weight, each time."""
        can_run = native_kernel.can_run(input, self.bits, self._scale[0].value, None)
        return can_run and native_kernel.layout_of(self.structure, self.shape) is not None


def use_int8_activations(model: nn.Module, enabled: bool = True) -> None:
    """Have every `PackedLinear` of a model round its input to int8, with a scale for each sample, or stop doing so.

    Inference alone, and less than exact: `functional.packed_linear_int8` has the formula and bounds of the error.
    Adjoints, convolutions and weights that are unpacked in front of their module stay exact. It is a choice of how a
    model runs: files, state dicts and what `export` writes know nothing of it.

    Args:
        model: what ``convert`` returned; changed in place.
        enabled: False brings the exact products back.

    Raises:
        PIBiNNError: the model has no `PackedLinear`.

    Example:
        >>> import pibinn_plugin as pb
        >>> model = pb.convert(pb.prepare(nn.Sequential(nn.Linear(16, 8)), {"0.weight": None}))
        >>> use_int8_activations(model)
        >>> with torch.no_grad():
        ...     model(torch.randn(3, 16)).shape
        torch.Size([3, 8])
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if not layers:
        raise PIBiNNError("the model has no PackedLinear, which alone has int8 activations; did you convert it?")
    for layer in layers:
        layer.int8_activations = enabled


class PackedConv(_PackedLayer):
    """A convolution in one, two or three dimensions on packed signs, with the arguments of the layer it replaces."""

    def __init__(self, packed: PackedSigns, scale: GlobalScale, convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(packed, scale, convolution.bias, compact=False)
        self.stride, self.dilation, self.groups = convolution.stride, convolution.dilation, convolution.groups
        self.padding, self.padding_mode = convolution.padding, convolution.padding_mode
        self._reversed_padding = convolution._reversed_padding_repeated_twice

    @override
    def forward(self, input: Tensor) -> Tensor:
        weight = self.packed_signs.weight(self._scale[0](), False, input.dtype)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding, self.padding_mode), (0,) * (weight.dim() - 2)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return convolve(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)
