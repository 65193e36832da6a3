"""The compact float layer, which holds only its structural nonzeros.

Use `CompactLinear` in place of ``nn.Linear`` with a mask: time and memory of training go with the structural nonzeros,
not with rows × columns. `BlockDiagonalLinear` and `BandedLinear` are short ways to write it for two structures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.structure import Banded, BlockDiagonal, Shape, Structure


class CompactLinear(nn.Module):
    """``y = W x + b`` with W stored as its structural nonzeros, of any structure.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        structure: where W may be nonzero; ``weight`` has its ``compact_shape``.
        bias: whether there is a b.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        StructureError: the structure does not fit ``(out_features, in_features)``.

    Example:
        >>> layer = CompactLinear(64, 32, BlockDiagonal(8))
        >>> layer.weight.shape, layer(torch.randn(5, 64)).shape
        (torch.Size([8, 4, 8]), torch.Size([5, 32]))
    """

    bias: nn.Parameter | None

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
        own_bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own_bias)
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


def compact_linear(input: Tensor, weight: Tensor, structure: Structure, shape: Shape, bias: Tensor | None) -> Tensor:
    """``F.linear`` for a weight in compact form: input ``(..., columns)``, result ``(..., rows)``."""
    output = structure.linear(input, weight, shape)
    return output if bias is None else output + bias


def BlockDiagonalLinear(  # noqa: N802 - reads as the layer that it makes
    in_features: int,
    out_features: int,
    blocks: int | BlockDiagonal,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CompactLinear:
    """A `CompactLinear` of blocks: ``blocks`` equal ones, or those of a `BlockDiagonal`.

    Raises:
        StructureError: the blocks do not fit.

    Example:
        >>> BlockDiagonalLinear(64, 32, 8).weight.shape
        torch.Size([8, 4, 8])
    """
    structure = BlockDiagonal(blocks) if isinstance(blocks, int) else blocks
    return CompactLinear(in_features, out_features, structure, bias, device, dtype)


def BandedLinear(  # noqa: N802 - reads as the layer that it makes
    in_features: int,
    out_features: int,
    lower: int,
    upper: int,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CompactLinear:
    """A `CompactLinear` of the diagonals from ``lower`` below the main one to ``upper`` above it.

    Raises:
        StructureError: the band does not fit.

    Example:
        >>> BandedLinear(6, 6, 1, 1).weight.shape
        torch.Size([16])
    """
    return CompactLinear(in_features, out_features, Banded(lower, upper), bias, device, dtype)
