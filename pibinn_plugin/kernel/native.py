"""Products by a backend of the operators (`operators`): when one can run, and how it is to read the signs."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from pibinn_plugin.kernel import cpu
from pibinn_plugin.kernel.operators import FUSED, INT8, PREPARE, PRODUCT, UNPACK, prepared_words
from pibinn_plugin.structure import BlockDiagonal, Dense, Shape, Structure, matrix_shape
from pibinn_plugin.structure.base import constant
from pibinn_plugin.structure.sparse_rows import sparse_rows

# The rows and the columns of each block: one number where all blocks are equal.
Blocks = tuple[int, int] | tuple[tuple[int, ...], tuple[int, ...]]
# The same, or the index of `sparse_rows` and the shape of the matrix.
Layout = Blocks | tuple[Tensor, tuple[int, int]]

# Not a tensor subclass with products of its own. The latter two stand for tensors while a torchao weight is compiled.
_KINDS = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})

_MOST_PADDED = 1.25  # times the bits: what is laid out for products takes at most so much memory

_LARGEST_ON_CUDA = 2**30  # rows or columns: places in a block are counted in 32 bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel() -> str:
    """The path in use: ``avx512``, ``avx2``, ``portable``, or ``torch`` where there is no native kernel.

    Example:
        >>> kernel() in ("avx512", "avx2", "portable", "torch")
        True
    """
    return _KERNEL


@cache
def warn_without_kernel() -> None:
    """Say once, at the first use, that plain torch runs although this machine could do better, and why."""
    if _REASON:
        warnings.warn(
            f"packed weights run in plain torch, which is slower: the native kernel cannot be used, {_REASON}; install "
            "pibinn_plugin again where there is a C++20 compiler, or set PIBINN_KERNEL=torch to have it so",
            stacklevel=2,
        )


def blocks_of(structure: Structure, shape: Shape) -> Blocks | None:
    """The blocks that hold the bits of a weight; None for a structure that has none."""
    if isinstance(structure, Dense):
        return matrix_shape(shape)
    if not isinstance(structure, BlockDiagonal):
        return None
    if structure.rows is not None and structure.columns is not None:
        return structure.rows, structure.columns
    _, rows, columns = structure.compact_shape(shape)
    return rows, columns


def layout_of(structure: Structure, shape: Shape) -> Layout | None:
    """How the kernel is to read the bits of a weight: in blocks, or for a mask or a band by an index.

    None for what is left to torch: a weight whose index cannot be had, and all without a kernel. The density of a mask
    and the number of samples decide nothing, since torch would have to unpack the bits and to place them. With AVX2
    that is 2 to 60 times slower for up to 64 samples. It is faster, at most 1.7 times, for more than half of all
    elements and hundreds of samples alone.
    """
    blocks = blocks_of(structure, shape)
    if blocks is not None or _KERNEL == "torch":
        return blocks
    index = sparse_rows(structure, shape)
    return None if index is None else (index, matrix_shape(shape))


def can_run(input: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout | None = None) -> bool:
    """Whether a backend takes these tensors, here and now; what it does not take is left to torch.

    On a CPU all operators run, where there is a kernel; on a CUDA device products with the layout that is given, if it
    is one of equal blocks.

    Not under a functorch transform or forward-mode differentiation, whose rules plain torch operations have; and not
    while a program is exported, which is to run without this package.
    """
    # Written out: a small product takes less time than a loop over four tensors.
    return (
        input.dtype in DTYPES
        and scale.dtype in DTYPES
        and type(input) in _KINDS
        and type(bits) in _KINDS
        and type(scale) in _KINDS
        and (bias is None or (bias.dtype is input.dtype and type(bias) in _KINDS))
        and (
            (input.is_cpu and bits.is_cpu and scale.is_cpu and _KERNEL != "torch")
            or (layout is not None and input.is_cuda and _runs_on_cuda(input, bits, scale, bias, layout))
        )
        and input.layout is torch.strided
        and not input.is_nested
        and not torch.compiler._is_exporting_flag  # its function is always true where torch 2.11 compiles
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def _runs_on_cuda(input: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout) -> bool:
    device, (rows, columns) = input.device, layout
    return (
        _HAS_TRITON
        and isinstance(rows, int)
        and isinstance(columns, int)
        and rows < _LARGEST_ON_CUDA
        and columns < _LARGEST_ON_CUDA
        and bits.device == device
        and scale.device == device
        and (bias is None or bias.device == device)
        and _multiplies_bfloat16(device)
    )


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device has tensor cores for it; none where there is none, which fake tensors do not need."""
    return torch.cuda.is_available() and torch.cuda.get_device_properties(device).major >= 8


def layout_for(
    input: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, structure: Structure, shape: Shape
) -> Layout | None:
    """How a product of these tensors is to read the bits; None where plain torch operations are to run."""
    if not input.is_cuda:  # in this order: an index is not made where the kernel cannot run
        return layout_of(structure, shape) if can_run(input, bits, scale, bias) else None
    is_permuted = isinstance(structure, BlockDiagonal) and structure.row_order is not None
    layout = None if is_permuted else blocks_of(structure, shape)
    return layout if can_run(input, bits, scale, bias, layout) else None


def as_arguments(layout: Layout, input: Tensor) -> tuple[Any, Any]:
    """The two arguments that an operator takes for a layout: an index goes into the trace that the input may be of."""
    first, second = layout
    if isinstance(first, Tensor) and type(input) is not Tensor:
        return constant(first, "cpu"), second
    return first, second


def packed_linear(
    input: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout, transposed: bool
) -> Tensor:
    """``λ S x + b``, or ``λ Sᵀ x``; differentiable in input, λ and bias."""
    kind = type(layout[0])
    rows, columns = as_arguments(layout, input)
    needs_gradient = torch.is_grad_enabled() and (
        input.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad)
    )
    if needs_gradient:
        output = PRODUCT[kind](input, bits, rows, columns, transposed) * scale.to(input.dtype)
        return output if bias is None else output + bias
    return FUSED[kind](input, bits, scale, rows, columns, bias, transposed, True)


def packed_linear_int8(
    input: Tensor, bits: Tensor, scale: Tensor, activation_scales: Tensor, bias: Tensor | None, blocks: Blocks
) -> Tensor:
    """``λ s S round(x / s) + b`` for blocks S and a scale s of each sample: float32, contiguous, normal or NaN."""
    rows, columns = blocks
    return INT8[type(rows)](input, bits, scale, activation_scales, rows, columns, bias)


def prepare(bits: Tensor, blocks: Blocks, count: int) -> Tensor | None:
    """The first ``count`` bits, laid out for products: about as large, and taken in their place; None if much larger.

    Larger by what fills the rows and the columns of a block up to 32.
    """
    rows, columns = blocks
    if isinstance(rows, int) and isinstance(columns, int):
        copies = count // max(rows * columns, 1)
        rows, columns = (rows,) * copies, (columns,) * copies
    assert isinstance(rows, tuple) and isinstance(columns, tuple)
    return PREPARE(bits, rows, columns) if 32 * prepared_words(rows, columns) <= _MOST_PADDED * count else None


def unpack(bits: Tensor, scale: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``±λ`` for the first ``count`` bits, with the λ that `GlobalScale` makes of its parameter; without a gradient."""
    return UNPACK(bits, scale, count, dtype)


def _at_first_use(name: str) -> Callable[..., Tensor]:
    """An operator of the CUDA backend. Importing Triton takes long, and is left to the first product."""

    def product(*arguments: Any) -> Tensor:
        from pibinn_plugin.kernel import cuda

        return getattr(cuda, name)(*arguments)

    return product


_KERNEL, _REASON = cpu.load()
_HAS_TRITON = (
    torch.version.cuda is not None
    and os.environ.get("PIBINN_KERNEL") != "torch"
    and importlib.util.find_spec("triton") is not None
)
if _HAS_TRITON:
    for _name in ("packed_linear", "sign_product"):
        torch.library.impl(f"pibinn::{_name}", "cuda", _at_first_use(_name))
