"""`packed_linear` against a dense matrix product written in numpy."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pibinn_plugin.functional import packed_linear, packed_linear_adjoint
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on its first export

CASES = [
    (Dense(), (5, 4)),
    (Banded(1, 2), (4, 6)),
    (BlockDiagonal(3), (6, 9)),
    (BlockDiagonal(rows=(1, 3), columns=(2, 1)), (4, 3)),
    (BlockDiagonal(2, row_order=(3, 0, 2, 1), column_order=(1, 0, 3, 2)), (4, 4)),
    (Mask([[1, 0, 1], [0, 1, 1]]), (2, 3)),
]


def packed_and_matrix(structure, shape):
    latent = torch.randn(shape)
    signs = np.where(latent.numpy() >= 0, 1.0, -1.0) * structure.mask(shape).numpy()
    return PackedSigns.pack(latent, structure, shape).bits, signs


@given(st.sampled_from(CASES), st.sampled_from([(), (3,), (2, 3), (0,)]), st.booleans())
def test_is_the_dense_product(case, batch, has_bias):
    structure, shape = case
    bits, signs = packed_and_matrix(structure, shape)
    input = torch.randn(*batch, shape[1], dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64) if has_bias else None
    output = packed_linear(input, bits, torch.tensor([0.3], dtype=torch.float64), structure, shape, bias)
    expected = 0.3 * input.numpy() @ signs.T + (bias.numpy() if has_bias else 0.0)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("structure", "shape"), CASES)
def test_single_and_half_precision(structure, shape):
    bits, signs = packed_and_matrix(structure, shape)
    counts = torch.randint(-4, 5, (7, shape[1]))
    expected = 0.5 * counts.double().numpy() @ signs.T  # exact in each of the dtypes
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        output = packed_linear(counts.to(dtype), bits, torch.tensor([0.5]), structure, shape)
        assert output.dtype == dtype
        assert np.array_equal(output.double().numpy(), expected)


@pytest.mark.parametrize(("structure", "shape"), CASES)
def test_gradients_of_input_scale_and_bias(structure, shape):
    bits, _ = packed_and_matrix(structure, shape)
    input = torch.randn(3, shape[1], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    function = lambda x, s, b: packed_linear(x, bits, s, structure, shape, b)  # noqa: E731
    assert torch.autograd.gradcheck(function, (input, scale, bias))
    assert torch.autograd.gradgradcheck(function, (input, scale, bias))
    assert torch.autograd.gradcheck(function, (input, scale, bias), check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the kernel, and without it
@pytest.mark.parametrize(("structure", "shape"), CASES)
def test_inference_mode_changes_nothing(structure, shape, dtype):
    packed, scale = PackedSigns.pack(torch.randn(shape), structure, shape), torch.tensor([0.5], dtype=dtype)
    x, y = torch.randn(3, shape[1], dtype=dtype), torch.randn(3, shape[0], dtype=dtype)
    for function, operand in ((packed_linear, x), (packed_linear_adjoint, y)):
        expected = function(operand, packed.bits, scale, structure, shape)
        assert expected.abs().sum() > 0
        with torch.inference_mode():
            for each in (operand, operand.clone()):  # the latter made there
                assert torch.equal(function(each, packed.bits, scale, structure, shape), expected)


def test_vmap_and_jvp_are_those_of_the_dense_product():
    structure, shape = BlockDiagonal(2), (4, 6)
    bits, signs = packed_and_matrix(structure, shape)
    weight, scale = torch.from_numpy(signs).float(), torch.tensor([0.5])
    batch, tangent = torch.randn(5, 6), torch.randn(6)
    over_inputs = torch.func.vmap(lambda x: packed_linear(x, bits, scale, structure, shape))(batch)
    torch.testing.assert_close(over_inputs, batch @ (0.5 * weight).T)
    scales = torch.tensor([[0.5], [2.0]])
    over_scales = torch.func.vmap(lambda s: packed_linear(batch[0], bits, s, structure, shape))(scales)
    torch.testing.assert_close(over_scales, scales * (weight @ batch[0]))
    _, derivative = torch.func.jvp(lambda x: packed_linear(x, bits, scale, structure, shape), (batch[0],), (tangent,))
    torch.testing.assert_close(derivative, 0.5 * weight @ tangent)


class Packed(torch.nn.Module):
    def __init__(self, structure, shape):
        super().__init__()
        self.structure, self.shape = structure, shape
        self.register_buffer("bits", packed_and_matrix(structure, shape)[0])
        self.scale = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, input):
        return packed_linear(input, self.bits, self.scale, self.structure, self.shape)


def test_compiles_without_a_graph_break():
    layers = torch.nn.ModuleList(Packed(structure, shape) for structure, shape in CASES)

    def all_of_them(*inputs):
        return [layer(input) for layer, input in zip(layers, inputs, strict=True)]

    inputs = [torch.randn(2, shape[1]) for _, shape in CASES]
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(*inputs)
    for value, expected in zip(compiled, all_of_them(*inputs), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("structure", "shape"), CASES)
def test_exports_and_still_runs_eagerly(structure, shape):
    """Also when the structure is used for the first time under export: nothing fake may be left behind in it."""
    module, input = Packed(structure, shape), torch.randn(3, shape[1])
    module.structure = type(structure).from_bytes(structure.to_bytes())
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (input,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(input), module(input))
    larger = torch.randn(5, shape[1])
    torch.testing.assert_close(program.module()(larger), Packed.forward(module, larger))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_compiles_with_the_default_backend():
    module, input = Packed(BlockDiagonal(2), (4, 6)), torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(input), module(input))


@pytest.mark.parametrize("structure", [Dense(), BlockDiagonal(2), Banded(1, 1), Mask(torch.eye(4))])
@pytest.mark.parametrize("value", [-0.5, 0.0, -1e-40])
def test_the_scale_is_taken_as_it_is(structure, value):
    """What makes it positive is `GlobalScale`, and no product."""
    packed, x = PackedSigns.pack(torch.randn(4, 4), structure, (4, 4)), torch.randn(3, 4)
    scale = torch.tensor([value])
    weight = packed.weight(scale, False, torch.float32)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            y = packed_linear(x, packed.bits, scale.clone().requires_grad_(gradient), structure, (4, 4))
            back = packed_linear_adjoint(x, packed.bits, scale, structure, (4, 4))
        torch.testing.assert_close(y, x @ weight.mT)
        torch.testing.assert_close(back, x @ weight)
