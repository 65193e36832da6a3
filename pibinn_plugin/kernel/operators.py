"""The operators of the namespace ``pibinn``: what they mean to torch, whatever implements them.

Their schemas, the shapes of their results and their gradients are here; a backend implements them for its device, under
the same names (`cpu`, whose shared object does it in C++). Another one is a file of its own, which implements them by
``torch.library.impl(name, device_type)``, its import in `native`, and its device in `native.can_run`.

``packed_linear`` has the scale and the bias in it and no gradient; ``sign_product`` is linear and has one.
``packed_linear_int8`` rounds each sample to int8 multiples of its activation scale; its scale is a signed one.
``packed_convolution`` is ``packed_linear`` for the images or signals of a convolution, in float32, without a gradient.
``prepare`` lays the bits of blocks out in the order in which a product uses them: words of 32, for this processor and
this process alone. Operators for blocks, unless transposed, take these words in the place of the bits.
``unpack`` gives the values ``±λ`` of the first ``count`` bits; ``refresh`` writes them into a weight that was unpacked
before, if bits or λ are no longer what was ``seen`` then: bytes, those of the bits and 4 of λ. A weight with a mask has
them at ``positions``, and zeros elsewhere. ``unpack_in_graph`` is ``unpack`` in plain torch operations, in whose place
they come to stand where a graph is compiled; it has a gradient and runs on any device.

Rows and columns are those of each block, in lists where blocks are uneven; index and shape are those of a matrix of any
pattern. Unchecked: the numbers of the index are taken to lie within the matrix, as they do where `sparse_rows` made it.
A scale that is not signed is what `GlobalScale` makes of its parameter. What has a default is last: each argument that
a call passes costs as much as a hundred multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from pibinn_plugin.bits import bits_of_bytes
from pibinn_plugin.quantizer import positive

# The two arguments that describe where the signs are, by the overload that takes them.
_LAYOUTS = {
    "": "int rows, int columns",
    "uneven": "int[] rows, int[] columns",
    "sparse": "Tensor index, int[] shape",
    "sparse_unchecked": "Tensor index, int[] shape",
}
_BLOCKS = ("", "uneven")

_library = torch.library.Library("pibinn", "DEF")


def _overload(operator: str, layout: str) -> str:
    return f"{operator}.{layout}" if layout else operator


def _fake(name: str, shape: Callable[..., Tensor | None]) -> None:
    torch.library.register_fake(f"pibinn::{name}", shape, lib=_library)


def _define() -> None:
    for name, layout in _LAYOUTS.items():
        _library.define(
            f"{_overload('packed_linear', name)}(Tensor input, Tensor bits, Tensor scale, {layout}, "
            "Tensor? bias=None, bool transposed=False, bool signed_scale=False) -> Tensor"
        )
        _library.define(
            f"{_overload('sign_product', name)}(Tensor input, Tensor bits, {layout}, bool transposed=False) -> Tensor"
        )
        _fake(_overload("packed_linear", name), _packed_linear)
        _fake(_overload("sign_product", name), _sign_product)
        torch.library.register_autograd(
            f"pibinn::{_overload('sign_product', name)}", _backward, setup_context=_save, lib=_library
        )
    for name in _BLOCKS:
        _library.define(
            f"{_overload('packed_linear_int8', name)}(Tensor input, Tensor bits, Tensor scale, "
            f"Tensor activation_scales, {_LAYOUTS[name]}, Tensor? bias=None) -> Tensor"
        )
        _fake(_overload("packed_linear_int8", name), _packed_linear_int8)
    _library.define(
        "packed_convolution(Tensor input, Tensor bits, Tensor scale, int outputs, int[] kernel_size, int[] stride, "
        "int[] padding, int[] dilation, int groups, Tensor? bias=None) -> Tensor"
    )
    _fake("packed_convolution", _packed_convolution)
    _library.define("prepare(Tensor bits, int[] rows, int[] columns) -> Tensor")
    _fake("prepare", _prepare)
    _library.define("unpack(Tensor bits, Tensor scale, int count, ScalarType dtype) -> Tensor")
    _fake("unpack", _unpack)
    _library.define("unpack_in_graph(Tensor bits, Tensor scale, int count, ScalarType dtype) -> Tensor")
    _library.impl("unpack_in_graph", _unpack_in_graph, "CompositeImplicitAutograd")
    _library.define(
        "refresh(Tensor(a!) weight, Tensor(b!) seen, Tensor bits, Tensor scale, Tensor? positions=None) -> ()"
    )
    _fake("refresh", _refresh)
    torch.library.register_torch_dispatch("pibinn::refresh", FunctionalTensorMode, _refresh_once, lib=_library)


def _packed_linear(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    rows: int | Sequence[int] | Tensor,
    columns: int | Sequence[int],
    bias: Tensor | None = None,
    transposed: bool = False,
    signed_scale: bool = False,
) -> Tensor:
    return _sign_product(input, bits, rows, columns, transposed)


def _packed_linear_int8(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    activation_scales: Tensor,
    rows: int | Sequence[int],
    columns: int | Sequence[int],
    bias: Tensor | None = None,
) -> Tensor:
    return _sign_product(input, bits, rows, columns)


def _sign_product(
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


def _packed_convolution(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    outputs: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    axes = zip(input.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    positions = [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in axes]
    channels_last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.contiguous_format if input.is_contiguous() or not channels_last else torch.channels_last
    return torch.empty(
        (input.shape[0], outputs, *positions), dtype=input.dtype, device=input.device, memory_format=memory_format
    )


def prepared_words(rows: Sequence[int], columns: Sequence[int]) -> int:
    """The words that ``prepare`` makes: one bit for each weight, and for what fills rows and columns up to 32."""
    return sum(-(-row // 32) * 32 * -(-column // 32) for row, column in zip(rows, columns, strict=True))


def _prepare(bits: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    return bits.new_empty((prepared_words(rows, columns),), dtype=torch.int32)


def _unpack(bits: Tensor, scale: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return bits.new_empty((count,), dtype=dtype)


def _unpack_in_graph(bits: Tensor, scale: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """In a graph that reads a weight many times the first read alone unpacks it, unless something is written.

    The compiler would do it for each of them.
    """
    if not isinstance(bits, FunctionalTensor):
        return _unpack_in_torch(bits, scale, count, dtype)
    how = count, dtype, torch.is_grad_enabled()
    values, known_how, seen = vars(bits).get("_unpacked", (bits, None, ()))
    if how != known_how or not all(map(is_, seen, _values([bits, scale, values]))):
        values = _unpack_in_torch(bits, scale, count, dtype)
        vars(bits)["_unpacked"] = values, how, _values([bits, scale, values])
    return values


def _unpack_in_torch(bits: Tensor, scale: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    scale = positive(scale).to(dtype)
    values = torch.where(bits_of_bytes(bits), scale, -scale)
    # As a tensor of its own, byte by byte: the compiler would unpack in every product that it fuses, and without vector
    # instructions where rows are no multiples of 8.
    return values.as_strided((values.numel(),), (1,))[:count]


def _refresh_once(mode: FunctionalTensorMode, operator: Any, types: Any, arguments: Any, options: Any) -> None:
    """In a graph that reads a weight many times the first read alone brings it up to date, unless something is written.

    The compiler would copy the whole weight for each of them.
    """
    weight = arguments[0]
    seen = getattr(weight, "_refreshed_from", None)
    if seen is None or not all(map(is_, seen, _values(arguments))):
        mode.__torch_dispatch__(operator, types, arguments, options)
        weight._refreshed_from = _values(arguments)


def _values(arguments: Sequence[Tensor]) -> list[Tensor]:
    """What tensors hold at this place of a graph; what is written to them there makes another tensor of it."""
    values = []
    for argument in arguments:
        if isinstance(argument, FunctionalTensor):
            argument.sync()
            argument = torch._from_functional_tensor(argument.elem)
        values.append(argument)
    return values


def _refresh(weight: Tensor, seen: Tensor, bits: Tensor, scale: Tensor, positions: Tensor | None = None) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.bits, ctx.rows, ctx.columns, ctx.transposed = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    product = PRODUCT[int if isinstance(ctx.rows, int) else Tensor if isinstance(ctx.rows, Tensor) else tuple]
    return product(gradient, ctx.bits, ctx.rows, ctx.columns, not ctx.transposed), None, None, None, None


_define()
# The operators for equal blocks, for uneven ones and for an index, by the type of what describes rows. An index of
# `sparse_rows` needs no check; ``sparse``, for an index of anybody's, looks at all of its numbers in each call.
_ops = torch.ops.pibinn
FUSED: dict[type, Any] = {
    int: _ops.packed_linear.default,
    tuple: _ops.packed_linear.uneven,
    Tensor: _ops.packed_linear.sparse_unchecked,
}
INT8: dict[type, Any] = {int: _ops.packed_linear_int8.default, tuple: _ops.packed_linear_int8.uneven}
PRODUCT: dict[type, Any] = {
    int: _ops.sign_product.default,
    tuple: _ops.sign_product.uneven,
    Tensor: _ops.sign_product.sparse_unchecked,
}
CONVOLUTION: Any = _ops.packed_convolution.default
PREPARE: Any = _ops.prepare.default
UNPACK: Any = _ops.unpack.default
UNPACK_IN_GRAPH: Any = _ops.unpack_in_graph.default
REFRESH: Any = _ops.refresh.default
