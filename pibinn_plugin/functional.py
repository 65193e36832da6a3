"""`packed_linear` and `packed_linear_adjoint`: products with a one-bit weight that stays packed in memory.

Dense and block-diagonal weights are multiplied by the native kernel (`native_kernel`), where it was built and the
tensors are on a CPU. Everything else, and every trace that is exported, runs in plain torch operations, the reference:
the same values to the rounding of float32.
"""

import torch
from torch import Tensor

from pibinn_plugin import native_kernel
from pibinn_plugin.native_kernel import Blocks, kernel
from pibinn_plugin.packing import unpack_signs
from pibinn_plugin.structure import BlockDiagonal, Shape, Structure, matrix_shape
from pibinn_plugin.structure.base import constant

__all__ = ["kernel", "packed_linear", "packed_linear_adjoint"]


def packed_linear(
    input: Tensor, bits: Tensor, scale: Tensor, structure: Structure, shape: Shape, bias: Tensor | None = None
) -> Tensor:
    """``y = λ (S ⊙ M) x + b``, differentiable in x, λ and b.

    Args:
        input: x, shape ``(..., columns)``, floating point.
        bits: uint8, shape ``(ceil(nnz / 8),)``, the packed signs.
        scale: λ, shape ``(1,)``.
        structure: M.
        shape: the dense shape ``(rows, columns)`` of the weight.
        bias: b, shape ``(rows,)``.

    Returns:
        shape ``(..., rows)``, in the dtype of ``input``.

    Example:
        >>> import torch
        >>> from pibinn_plugin import Dense
        >>> bits = torch.tensor([0b0110], dtype=torch.uint8)  # [[-1, +1], [+1, -1]]
        >>> packed_linear(torch.tensor([1.0, 3.0]), bits, torch.tensor([0.5]), Dense(), (2, 2))
        tensor([ 1., -1.])
    """
    blocks = native_kernel.blocks_of(structure, shape)
    if blocks is not None and native_kernel.can_run(input, bits, scale, bias):
        return _in_blocks(input, bits, scale, bias, structure, blocks)
    signs = unpack_signs(bits, structure.compact_shape(shape), input.dtype)
    output = structure.linear(input, signs, shape) * scale.to(input.dtype)
    return output if bias is None else output + bias


def packed_linear_adjoint(input: Tensor, bits: Tensor, scale: Tensor, structure: Structure, shape: Shape) -> Tensor:
    """``x = λ (S ⊙ M)ᵀ y``: the adjoint of `packed_linear` without a bias, differentiable in y and λ.

    Args:
        input: y, shape ``(..., rows)``, floating point.
        bits: uint8, shape ``(ceil(nnz / 8),)``, the packed signs of the weight itself, not of its transpose.
        scale: λ, shape ``(1,)``.
        structure: M.
        shape: the dense shape ``(rows, columns)`` of the weight.

    Returns:
        shape ``(..., columns)``, in the dtype of ``input``.

    Example:
        >>> import torch
        >>> from pibinn_plugin import Dense
        >>> bits = torch.tensor([0b001110], dtype=torch.uint8)  # [[-1, +1, +1], [+1, -1, -1]]
        >>> packed_linear_adjoint(torch.tensor([1.0, 3.0]), bits, torch.tensor([0.5]), Dense(), (2, 3))
        tensor([ 1., -1., -1.])
    """
    blocks = native_kernel.blocks_of(structure, shape)
    if blocks is not None and native_kernel.can_run(input, bits, scale, None):
        return _in_blocks_transposed(input, bits, scale, structure, blocks)
    signs = unpack_signs(bits, structure.compact_shape(shape), input.dtype)
    origin = input.new_zeros((*input.shape[:-1], matrix_shape(shape)[1]))
    # The derivative of a linear map is the map: this is the adjoint of every structure, without a dense tensor.
    adjoint = torch.func.vjp(lambda x: structure.linear(x, signs, shape), origin)[1]
    return adjoint(input)[0] * scale.to(input.dtype)


def _in_blocks(
    input: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, structure: Structure, blocks: Blocks
) -> Tensor:
    if not isinstance(structure, BlockDiagonal) or structure.row_order is None:
        return native_kernel.packed_linear(input, bits, scale, bias, blocks, False)
    ordered = input.index_select(-1, constant(structure._column_index, "cpu"))  # type: ignore[attr-defined]
    output = native_kernel.packed_linear(ordered, bits, scale, None, blocks, False)
    output = output.index_select(-1, constant(structure._row_index, "cpu"))  # type: ignore[attr-defined]
    return output if bias is None else output + bias


def _in_blocks_transposed(input: Tensor, bits: Tensor, scale: Tensor, structure: Structure, blocks: Blocks) -> Tensor:
    if not isinstance(structure, BlockDiagonal) or structure.row_order is None:
        return native_kernel.packed_linear(input, bits, scale, None, blocks, True)
    row_index = constant(structure._row_index, "cpu")  # type: ignore[attr-defined]
    column_index = constant(structure._column_index, "cpu")  # type: ignore[attr-defined]
    # A permutation's adjoint is its inverse: copying to where `index_select` would have read.
    ordered = torch.zeros_like(input).index_copy(-1, row_index, input)
    output = native_kernel.packed_linear(ordered, bits, scale, None, blocks, True)
    return torch.zeros_like(output).index_copy(-1, column_index, output)
