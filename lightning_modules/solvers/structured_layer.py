"""A learned matrix that starts at a given one and stores no more than the physics lets be nonzero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.structure import BlockDiagonal, Dense, Structure, structure_from_operator

__all__ = ["layer_of", "structured_layer"]


def structured_layer(blocks: Tensor) -> nn.Module:
    """A linear layer without bias whose weight starts at a block-diagonal matrix and keeps its structure.

    Several blocks become a `CompactLinear`; they are taken as they are, zeros included, and no dense matrix is
    made. The structure of a single block is read off its nonzeros by `structure_from_operator`: blocks, a band or a
    mask where it has zeros, ``nn.Linear`` where it has none. What is rounding of the physics (an FFT) is no weight, and
    a `SmallEntriesWarning` reports it. So a target of None is right for every layer made here.

    Args:
        blocks: shape ``(blocks, rows, columns)``, such as ``operator_blocks(operator).mT`` for the adjoint.

    Raises:
        StructureError: a single block without a nonzero entry, or with one that is not finite.

    Example:
        >>> structured_layer(torch.ones(4, 3, 2))
        CompactLinear(8, 12, BlockDiagonal(blocks=4, ...), bias=False)
        >>> structured_layer(torch.eye(3)[None]).weight.shape, type(structured_layer(torch.ones(1, 3, 2))).__name__
        (torch.Size([3, 1, 1]), 'Linear')
    """
    count, rows, columns = blocks.shape
    if count > 1:
        return _started(CompactLinear(count * columns, count * rows, BlockDiagonal(count), bias=False), blocks)
    structure = structure_from_operator(blocks[0])
    weight = blocks[0] if isinstance(structure, Dense) else structure.to_compact(blocks[0])
    return _started(layer_of(structure, rows, columns), weight)


def layer_of(structure: Structure, rows: int, columns: int) -> nn.Linear | CompactLinear:
    """A linear layer without bias with this structure, compact where it has zeros.

    Raises:
        StructureError: the structure does not fit ``(rows, columns)``.

    Example:
        >>> from pibinn_plugin import Banded
        >>> layer_of(Banded(1, 1), 4, 4).weight.shape
        torch.Size([10])
    """
    if isinstance(structure, Dense):
        return nn.Linear(columns, rows, bias=False)
    return CompactLinear(columns, rows, structure, bias=False)


def _started(layer: nn.Linear | CompactLinear, weight: Tensor) -> nn.Module:
    # A copy: no two layers share one start. Contiguous: safetensors stores nothing else.
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    return layer
