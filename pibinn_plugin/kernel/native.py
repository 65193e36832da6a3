"""The native kernel of `functional.packed_linear`: loading it, asking which path runs, and what torch must know of it.

It is an optional shared object, ``_kernel``, built from ``csrc/`` where there is a compiler. Its operators, in the
namespace ``pibinn``, take signs as they are stored, in blocks or placed by the index of `sparse_rows`, on a CPU, and
activations of 32 or 16 bits: ``packed_linear``, with λ and bias and without gradients, ``packed_linear_int8``, the same
for blocks with int8 activations, and ``sign_product``, linear and differentiable.

The environment variable ``PIBINN_KERNEL`` (``torch``, ``portable``, ``avx2``, ``avx512``) forces a path.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import torch
import torch.autograd.forward_ad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.structure import BlockDiagonal, Dense, Shape, Structure, matrix_shape
from pibinn_plugin.structure.base import constant
from pibinn_plugin.structure.sparse_rows import sparse_rows

# The rows and the columns of each block: one number where all blocks are equal.
Blocks = tuple[int, int] | tuple[tuple[int, ...], tuple[int, ...]]
# The same, or the index of `sparse_rows` and the shape of the matrix.
Layout = Blocks | tuple[Tensor, tuple[int, int]]

_INTERFACE = 4  # of the shared object; raised with every change of its operators

# Not a tensor subclass with products of its own. The latter two stand for tensors while a torchao weight is compiled.
_KINDS = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel() -> str:
    """The path in use: ``avx512``, ``avx2``, ``portable``, or ``torch`` where there is no native kernel.

    Example:
        >>> kernel() in ("avx512", "avx2", "portable", "torch")
        True
    """
    return _KERNEL


def _load() -> str:
    """Load the shared object; returns the name of the path in use. Raises as importing the package does."""
    forced = os.environ.get("PIBINN_KERNEL", "")
    if forced not in ("", "torch", "portable", "avx2", "avx512"):
        raise PIBiNNError(f"PIBINN_KERNEL={forced!r}: expected torch, portable, avx2 or avx512")
    path = Path(__file__).with_name(f"_kernel{EXTENSION_SUFFIXES[0]}")
    if forced == "torch" or not path.exists():
        return _plain(forced, f"it was not built: there is no {path.name} (install with a C++ compiler)")
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
    except OSError as error:  # built against a torch that is no longer there
        return _plain(forced, str(error))
    if getattr(library, "pibinn_interface", lambda: None)() != _INTERFACE:
        return _plain(forced, f"{path.name} was built from other sources: install this package again")
    library.pibinn_kernel.restype = ctypes.c_char_p
    name = library.pibinn_kernel().decode()
    if name.startswith("PIBINN_KERNEL"):
        raise PIBiNNError(name)
    return name


def _plain(forced: str, reason: str) -> str:
    if forced not in ("", "torch"):
        raise PIBiNNError(f"PIBINN_KERNEL={forced!r}, but the native kernel cannot be used: {reason}")
    return "torch"


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


def can_run(input: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether the native kernel takes these tensors, here and now; what it does not take is left to torch.

    Not under a functorch transform or forward-mode differentiation, whose rules plain torch operations have; and not
    while a program is exported, which is to run without this package.
    """
    # Written out: a small product takes less time than a loop over four tensors.
    return (
        _KERNEL != "torch"
        and input.dtype in DTYPES
        and scale.dtype in DTYPES
        and type(input) in _KINDS
        and type(bits) in _KINDS
        and type(scale) in _KINDS
        and (bias is None or (bias.dtype is input.dtype and type(bias) in _KINDS))
        and input.is_cpu
        and bits.is_cpu
        and scale.is_cpu
        and input.layout is torch.strided
        and not input.is_nested
        and not torch.compiler.is_exporting()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


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


def _register() -> None:
    """What traces, compiles and differentiates: the shapes of results, and the gradient, which is the transpose."""
    for name in ("", ".uneven", ".sparse", ".sparse_unchecked"):
        torch.library.register_fake(f"pibinn::packed_linear{name}", _fake_packed_linear)
        torch.library.register_fake(f"pibinn::sign_product{name}", _fake_sign_product)
        torch.library.register_autograd(f"pibinn::sign_product{name}", _backward, setup_context=_save)
    for name in ("", ".uneven"):
        torch.library.register_fake(f"pibinn::packed_linear_int8{name}", _fake_packed_linear_int8)


def _fake_packed_linear(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    rows: int | Sequence[int] | Tensor,
    columns: int | Sequence[int],
    bias: Tensor | None = None,
    transposed: bool = False,
    signed_scale: bool = False,
) -> Tensor:
    return _fake_sign_product(input, bits, rows, columns, transposed)


def _fake_packed_linear_int8(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    activation_scales: Tensor,
    rows: int | Sequence[int],
    columns: int | Sequence[int],
    bias: Tensor | None = None,
) -> Tensor:
    return _fake_sign_product(input, bits, rows, columns)


def _fake_sign_product(
    input: Tensor,
    bits: Tensor,
    rows: int | Sequence[int] | Tensor,
    columns: int | Sequence[int],
    transposed: bool = False,
) -> Tensor:
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    if isinstance(rows, Tensor):
        features = cast(Sequence[int], columns)[int(transposed)]
    elif isinstance(inputs, int) and isinstance(outputs, int):
        features = input.shape[-1] // inputs * outputs
    else:
        features = sum(cast(Sequence[int], outputs))
    return input.new_empty((*input.shape[:-1], features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.bits, ctx.rows, ctx.columns, ctx.transposed = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    product = PRODUCT[int if isinstance(ctx.rows, int) else Tensor if isinstance(ctx.rows, Tensor) else tuple]
    return product(gradient, ctx.bits, ctx.rows, ctx.columns, not ctx.transposed), None, None, None, None


_KERNEL = _load()
# The operators for equal blocks, for uneven ones and for an index, by the type of what is first in a `Layout`. An index
# of `sparse_rows` needs no check; ``sparse``, for an index of anybody's, looks at all of its numbers in each call.
FUSED: dict[type, Any] = {}
INT8: dict[type, Any] = {}
PRODUCT: dict[type, Any] = {}
if _KERNEL != "torch":
    _register()
    FUSED |= {int: torch.ops.pibinn.packed_linear.default, tuple: torch.ops.pibinn.packed_linear.uneven}
    FUSED[Tensor] = torch.ops.pibinn.packed_linear.sparse_unchecked
    INT8 |= {int: torch.ops.pibinn.packed_linear_int8.default, tuple: torch.ops.pibinn.packed_linear_int8.uneven}
    PRODUCT |= {int: torch.ops.pibinn.sign_product.default, tuple: torch.ops.pibinn.sign_product.uneven}
    PRODUCT[Tensor] = torch.ops.pibinn.sign_product.sparse_unchecked
