"""Threads and the layout of the signs change no bit of a product: by hypothesis, and for shapes that once broke it."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import pibinn_plugin as pb
from pibinn_plugin.functional import kernel, packed_linear, packed_linear_adjoint, packed_linear_int8
from pibinn_plugin.kernel import native
from pibinn_plugin.packing import PackedSigns

pytestmark = [
    pytest.mark.skipif(kernel() == "torch", reason="plain torch promises nothing about threads"),
    pytest.mark.usefixtures("threads_as_before"),
]

SHARED = 2**20  # multiply-adds from which on a product is shared among threads
SCALE = torch.tensor([0.37])


def products(x, y, bits, structure, shape, bias):
    """The product with x, also of bits laid out for it, the adjoint of y, and the product with int8 activations."""
    blocks = native.blocks_of(structure, shape)
    words = None if blocks is None else native.prepare(bits, blocks, structure.nnz(shape))
    return (
        packed_linear(x, bits if words is None else words, SCALE, structure, shape, bias),
        packed_linear(x, bits, SCALE, structure, shape, bias),
        packed_linear_adjoint(y, bits, SCALE, structure, shape),
        packed_linear_int8(x, bits, SCALE, structure, shape, bias),
    )


@st.composite
def weights(draw):
    """A structure of each kind, and a shape that it fits."""
    rows, columns = draw(st.integers(30, 700)), draw(st.integers(30, 700))
    kind = draw(st.sampled_from(("dense", "even", "uneven", "mask", "band")))
    if kind == "dense":
        return pb.Dense(), (rows, columns)
    if kind == "even":
        count = draw(st.integers(1, 5))
        return pb.BlockDiagonal(count), (count * rows, count * columns)
    if kind == "uneven":
        # `any`: a block of neither rows nor columns is refused.
        blocks = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).filter(any), max_size=3))
        rows, columns = zip((rows, columns), *blocks, strict=True)
        return pb.BlockDiagonal(rows=rows, columns=columns), (sum(rows), sum(columns))
    if kind == "band":
        return pb.Banded(draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))), (rows, columns)
    pattern = torch.rand(rows, columns) < torch.linspace(0, draw(st.sampled_from((0.1, 1.0))), rows)[:, None]
    pattern[-1, -1] = True
    return pb.Mask(pattern), (rows, columns)


@given(weights(), st.integers(1, 300), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
@example((pb.Dense(), (700, 90)), 33, torch.float32)
@example((pb.Dense(), (90, 700)), 33, torch.float32)
@example((pb.Dense(), (300, 300)), 257, torch.float32)
@example((pb.Dense(), (1100, 1000)), 1, torch.float32)
@example((pb.BlockDiagonal(rows=(300, 95), columns=(90, 400)), (395, 490)), 33, torch.float32)
def test_threads_change_nothing(weight, samples, dtype):
    structure, shape = weight
    samples = max(samples, min(SHARED // structure.nnz(shape) + 1, 2000))
    bits, results = PackedSigns.pack(torch.randn(shape), structure, shape).bits, []
    x, y, bias = (torch.randn(sizes).to(dtype) for sizes in ((samples, shape[1]), (samples, shape[0]), (shape[0],)))
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(products(x, y, bits, structure, shape, bias))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))
    assert torch.equal(results[0][0], results[0][1])
