"""Products with a one-bit weight that stays packed in memory: exact, of the adjoint, and with int8 activations.

A backend (`kernel.native`) multiplies where there is one for the device: on CPUs the native kernel, where it was built;
on CUDA devices Triton, for equal blocks. Everything else, and every trace that is exported, runs in plain torch
operations, the reference: the same values to the rounding of float32.
"""

from collections.abc import Callable

import torch
import torch.autograd.forward_ad
from torch import Tensor

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.kernel import native
from pibinn_plugin.kernel.native import Layout, kernel
from pibinn_plugin.packing import unpack_signs
from pibinn_plugin.structure import BlockDiagonal, Shape, Structure, matrix_shape
from pibinn_plugin.structure.base import check_columns, constant

__all__ = ["kernel", "packed_linear", "packed_linear_adjoint", "packed_linear_int8"]

_LARGEST_INT8 = 127  # in magnitude: symmetric, without -128


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
    input, bias = _as_operands(input, bias)
    layout = native.layout_for(input, bits, scale, bias, structure, shape)
    if layout is not None:
        return _in_order(lambda x, b: native.packed_linear(x, bits, scale, b, layout, False), input, bias, structure)
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
    input, _ = _as_operands(input, None)
    layout = native.layout_for(input, bits, scale, None, structure, shape)
    if layout is not None:
        return _in_order_transposed(input, bits, scale, structure, layout)
    if torch.is_inference_mode_enabled():  # where torch 2.11 takes every derivative for zero
        with torch.inference_mode(False), torch.no_grad():
            return packed_linear_adjoint(input.clone(), bits, scale, structure, shape)
    signs = unpack_signs(bits, structure.compact_shape(shape), input.dtype)
    origin = input.new_zeros((*input.shape[:-1], matrix_shape(shape)[1]))
    # The derivative of a linear map is the map: this is the adjoint of every structure, without a dense tensor.
    adjoint = torch.func.vjp(lambda x: structure.linear(x, signs, shape), origin)[1]
    return adjoint(input)[0] * scale.to(input.dtype)


def packed_linear_int8(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    structure: Structure,
    shape: Shape,
    bias: Tensor | None = None,
    per_row: bool = True,
) -> Tensor:
    """``ŷ = λ s (S ⊙ M) q + b`` with ``q = round(x / s)`` in int8 and ``s = max |x| / 127``: W1A8, for inference.

    The product with q is exact, in integers; s is no less than the smallest normal number. With n structural nonzeros
    in a row of M, ``|ŷ - y| ≤ λ n s / 2`` for the exact y of `packed_linear`; rounding errors that are independent and
    uniform give a root mean square error of ``λ s √(n / 12)``, n being the number of those whose x is not zero. Both
    leave out the rounding of floating-point numbers.

    Args:
        input: x, shape ``(..., columns)``, floating point.
        bits: uint8, shape ``(ceil(nnz / 8),)``, the packed signs.
        scale: λ, shape ``(1,)``.
        structure: M.
        shape: the dense shape ``(rows, columns)`` of the weight.
        bias: b, shape ``(rows,)``.
        per_row: one s for each row of the input, that is for each sample; otherwise one for the whole input, and the
            result for a sample depends on the others.

    Returns:
        shape ``(..., rows)``, in the dtype of ``input``; b where x is zero. Where the x that s is taken from has a NaN
        or an infinite value, s is NaN, and so is all that s multiplies.

    Raises:
        PIBiNNError: a gradient is to be computed, which rounding has none of; or an integer input.

    Example:
        >>> import torch
        >>> from pibinn_plugin import Dense
        >>> bits = torch.tensor([0b0110], dtype=torch.uint8)  # [[-1, +1], [+1, -1]]
        >>> packed_linear_int8(torch.tensor([1.0, 3.0]), bits, torch.tensor([0.5]), Dense(), (2, 2))  # q: 42, 127
        tensor([ 1.0039, -1.0039])
    """
    _check_no_gradient(input, scale, bias)
    input, bias = _as_operands(input, bias)
    step = _int8_step(input, per_row)
    blocks = native.blocks_of(structure, shape)
    if blocks is not None and native.can_run(input, bits, scale, bias):
        return _in_order(
            lambda x, b: native.packed_linear_int8(x, bits, scale, step, b, blocks), input, bias, structure
        )
    # Integers are exact in a float as long as their sums are; float32 products are the faster ones.
    is_small = _LARGEST_INT8 * matrix_shape(shape)[1] <= 2**24
    exact = torch.float32 if is_small and step.dtype == torch.float32 else torch.float64
    integers = (input.to(step.dtype) * step.reciprocal()).round().to(exact)
    sums = packed_linear(integers, bits, integers.new_ones(1), structure, shape)
    output = sums.to(step.dtype) * (scale.to(step.dtype) * step)
    return (output if bias is None else output + bias).to(input.dtype)


def _as_operands(input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Input and bias as ``F.linear`` would take them: in the dtype of autocast where it is on, never in integers."""
    if not input.is_floating_point():
        raise PIBiNNError(f"the input of a one-bit layer is {input.dtype}; expected a floating-point tensor")
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        return input.to(dtype), None if bias is None else bias.to(dtype)
    return input, bias


def _check_no_gradient(*tensors: Tensor | None) -> None:
    given = [tensor for tensor in tensors if tensor is not None]
    differentiates = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if torch.autograd.forward_ad._current_level >= 0:
        differentiates |= any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)
    if differentiates:
        raise PIBiNNError(
            "int8 activations are for inference, rounding has no gradient: call the model under torch.no_grad(), or "
            "switch them off with use_int8_activations(model, False)"
        )


def _int8_step(input: Tensor, per_row: bool) -> Tensor:
    """s, in float32 or wider, of shape ``(..., 1)``; NaN where it would be that or infinite."""
    largest = torch.maximum(input.amax(-1, keepdim=True), -input.amin(-1, keepdim=True))
    largest = largest.to(torch.promote_types(input.dtype, torch.float32))
    if not per_row and largest.numel() > 0:
        largest = largest.amax().expand(largest.shape).contiguous()
    # Not below a normal number, whose reciprocal is finite: zeros then stay zeros.
    step = (largest / _LARGEST_INT8).clamp(min=torch.finfo(largest.dtype).tiny)
    return step.where(step.isfinite(), torch.nan)


def _in_order(
    product: Callable[[Tensor, Tensor | None], Tensor], input: Tensor, bias: Tensor | None, structure: Structure
) -> Tensor:
    """A native product, given the input and the bias, between the orders of columns and rows that blocks may have."""
    if not isinstance(structure, BlockDiagonal) or structure.row_order is None or structure.column_order is None:
        return product(input, bias)
    check_columns(input, (1, len(structure.column_order)))
    ordered = input.index_select(-1, constant(structure._column_index, "cpu"))  # type: ignore[attr-defined]
    output = product(ordered, None)
    output = output.index_select(-1, constant(structure._row_index, "cpu"))  # type: ignore[attr-defined]
    return output if bias is None else output + bias


def _in_order_transposed(input: Tensor, bits: Tensor, scale: Tensor, structure: Structure, layout: Layout) -> Tensor:
    if not isinstance(structure, BlockDiagonal) or structure.row_order is None:
        return native.packed_linear(input, bits, scale, None, layout, True)
    row_index = constant(structure._row_index, "cpu")  # type: ignore[attr-defined]
    column_index = constant(structure._column_index, "cpu")  # type: ignore[attr-defined]
    # A permutation's adjoint is its inverse: copying to where `index_select` would have read.
    ordered = torch.zeros_like(input).index_copy(-1, row_index, input)
    output = native.packed_linear(ordered, bits, scale, None, layout, True)
    return torch.zeros_like(output).index_copy(-1, column_index, output)
