"""`packed_linear_int8` against integers of 64 bits in numpy, its error against its bound, and the switch of a model."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

import pibinn_plugin as pb
from pibinn_plugin import functional
from pibinn_plugin.functional import kernel, packed_linear, packed_linear_int8
from pibinn_plugin.packed import PackedLinear, use_int8_activations
from pibinn_plugin.packing import PackedSigns

CASES = [
    (pb.Dense(), (5, 40)),
    (pb.Dense(), (130, 600)),
    (pb.BlockDiagonal(3), (21, 36)),
    (pb.BlockDiagonal(rows=(1, 0, 9), columns=(5, 2, 33)), (10, 40)),
    (pb.BlockDiagonal(2, row_order=(3, 0, 2, 1), column_order=(1, 0, 3, 2)), (4, 4)),
    (pb.Banded(1, 2), (4, 6)),
    (pb.Mask([[1, 0, 1], [0, 1, 1], [0, 0, 0]]), (3, 3)),
]
SCALE = torch.tensor([0.3])
needs_kernel = pytest.mark.skipif(kernel() == "torch", reason="the native kernel was not built, or is switched off")


def random_weight(structure, shape):
    """Packed signs, and the integer matrix that they stand for."""
    packed = PackedSigns.pack(torch.randn(shape), structure, shape)
    return packed.bits, packed.weight(torch.ones(1), False, torch.float64).numpy().astype(np.int64)


def step_of(x, per_row):
    """s in float32, by numpy."""
    largest = np.abs(x).max(axis=-1, keepdims=True) if per_row else np.full((*x.shape[:-1], 1), np.abs(x).max())
    return largest.astype(np.float32) / np.float32(127)


# --------------------------------------------------------------------------------------------------------- values


@given(
    st.sampled_from(CASES),
    st.sampled_from([(), (1,), (3, 5), (17,), (37,)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_product_is_exact_in_integers(case, batch, dtype, per_row, seed):
    structure, shape = case
    torch.manual_seed(seed)
    bits, matrix = random_weight(structure, shape)
    x, bias = torch.randn(*batch, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    step = step_of(x.float().numpy(), per_row)
    integers = np.rint(x.float().numpy() * (np.float32(1) / step)).astype(np.int64)
    expected = torch.from_numpy((integers @ matrix.T).astype(np.float32) * (np.float32(0.3) * step))
    output = packed_linear_int8(x, bits, SCALE, structure, shape, per_row=per_row)
    assert output.dtype == dtype
    assert torch.equal(output, expected.to(dtype))
    shifted = packed_linear_int8(x, bits, SCALE, structure, shape, bias, per_row)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    allowed = rounding * (expected.abs() + bias.float().abs() + 1e-3)
    assert ((shifted.float() - expected - bias.float()).abs() <= allowed).all()


@pytest.mark.parametrize("samples", [1, 20])
@pytest.mark.parametrize("shape", [(130, 601), (2, 300_001)])  # beyond 16 bits; beyond the integers of float32
def test_product_is_exact_where_sums_are_largest(shape, samples):
    """Inputs of 126 and 127 steps, none of which cancels another."""
    signs = torch.tensor([1.0, -1.0]).repeat(shape[0] // 2)
    bits = PackedSigns.pack(signs[:, None].expand(shape), pb.Dense(), shape).bits
    x = 1 - 0.01 * torch.rand(samples, shape[1])
    step = step_of(x.numpy(), True)
    sums = np.rint(x.numpy() * (np.float32(1) / step)).astype(np.int64).sum(axis=1, keepdims=True)
    assert sums.min() > 126 * shape[1]
    expected = torch.from_numpy(sums.astype(np.float32) * (np.float32(0.3) * step)) * signs
    assert torch.equal(packed_linear_int8(x, bits, SCALE, pb.Dense(), shape), expected)


@given(st.sampled_from(CASES), st.floats(0.1, 8.0), st.booleans(), st.integers(0, 2**32))
def test_error_is_within_its_bound(case, tail, per_row, seed):
    structure, shape = case
    torch.manual_seed(seed)
    bits, matrix = random_weight(structure, shape)
    x = torch.randn(9, shape[1], dtype=torch.float64)
    x = x.sign() * x.abs() ** tail * torch.logspace(-3, 3, 9, dtype=torch.float64)[:, None]
    nonzeros = torch.from_numpy(np.abs(matrix).sum(axis=1))
    for dtype, rounding in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        exact = 0.3 * x.to(dtype).double() @ torch.from_numpy(matrix).double().T
        output = packed_linear_int8(x.to(dtype), bits, SCALE.double(), structure, shape, per_row=per_row)
        step = torch.from_numpy(step_of(x.to(dtype).numpy(), per_row)).double()
        # Float32 has a resolution that is relative to the largest input, as the rounding to int8 has.
        allowed = 0.3 * nonzeros * step * (0.5 + 127 * rounding + 1e-6)
        assert ((output.double() - exact).abs() <= allowed).all()


def test_error_has_the_root_mean_square_that_is_documented():
    torch.manual_seed(0)
    structure, shape = pb.BlockDiagonal(4), (400, 1000)
    bits, _ = random_weight(structure, shape)
    x = torch.randn(50, 1000, dtype=torch.float64)
    error = packed_linear_int8(x, bits, SCALE.double(), structure, shape)
    error = error - packed_linear(x, bits, SCALE.double(), structure, shape)
    expected = 0.3 * torch.from_numpy(step_of(x.numpy(), True)).double() * (250 / 12) ** 0.5
    assert 0.97 < (error / expected).square().mean().sqrt() < 1.03


@pytest.mark.parametrize(("structure", "shape"), CASES)
@pytest.mark.parametrize("samples", [3, 20])
def test_rows_are_independent_zeros_are_exact_and_what_is_not_finite_is_not_hidden(structure, shape, samples):
    bits, _ = random_weight(structure, shape)
    x, bias = torch.randn(samples, shape[1]), torch.randn(shape[0])
    x[0], x[1, -1], x[2, 0] = 0, float("nan"), -float("inf")
    output = packed_linear_int8(x, bits, SCALE, structure, shape, bias)
    assert torch.equal(output[0], bias)
    assert output[1:3].isnan().all()
    assert output[3:].isfinite().all()
    for sample in range(3, samples):
        alone = packed_linear_int8(x[sample], bits, SCALE, structure, shape)
        assert torch.equal(packed_linear_int8(x, bits, SCALE, structure, shape)[sample], alone)
    assert packed_linear_int8(x, bits, SCALE, structure, shape, bias, per_row=False).isnan().all()
    least = torch.finfo(torch.float32).smallest_normal
    tiny = packed_linear_int8(x[3:] * least / 1000, bits, SCALE, structure, shape)
    assert (tiny.abs() <= shape[1] * least).all()
    for per_row in (True, False):
        assert packed_linear_int8(x[:0], bits, SCALE, structure, shape, per_row=per_row).shape == (0, shape[0])


# ------------------------------------------------------------------------------------------------------ with torch


def test_a_gradient_is_an_error_and_not_a_wrong_number():
    structure, shape = CASES[2]
    bits, _ = random_weight(structure, shape)
    x = torch.randn(3, shape[1])

    def product(x, scale=SCALE, bias=None):
        return packed_linear_int8(x, bits, scale, structure, shape, bias)

    for differentiate in (
        lambda: product(x.clone().requires_grad_()),
        lambda: product(x, SCALE.clone().requires_grad_()),
        lambda: product(x, SCALE, torch.zeros(shape[0], requires_grad=True)),
        lambda: torch.func.grad(lambda x: product(x).sum())(x),
        lambda: torch.func.jvp(product, (x,), (x,)),
    ):
        with pytest.raises(pb.PIBiNNError, match="int8 activations are for inference"):
            differentiate()
    with torch.no_grad():
        assert torch.equal(product(x.clone().requires_grad_()), product(x))
    assert torch.equal(torch.func.vmap(product)(x), product(x))


@needs_kernel
def test_operators_keep_the_rules_of_torch():
    operators, scales = torch.ops.pibinn.packed_linear_int8, torch.rand(3, 1) + 1
    for overload, sizes, case in ((operators.default, (7, 12), 2), (operators.uneven, ([1, 0, 9], [5, 2, 33]), 3)):
        structure, shape = CASES[case]
        bits, _ = random_weight(structure, shape)
        x = torch.randn(3, shape[1])
        opcheck(overload, (x, bits, SCALE, scales, *sizes, torch.randn(shape[0])))
        for wrong in (scales[:2], scales.double(), torch.rand(3, 2)[:, :1]):
            with pytest.raises(RuntimeError, match="pibinn: expected "):
                overload(x, bits, SCALE, wrong, *sizes)


# ------------------------------------------------------------------------------------------------------- of a model


@pytest.fixture
def model():
    layers = nn.Sequential(nn.Linear(36, 21), nn.Tanh(), nn.Linear(21, 9))
    return pb.convert(pb.prepare(layers, {"0.weight": pb.BlockDiagonal(3), "2.weight": None})).requires_grad_(False)


def test_switch_of_a_model_changes_how_it_runs_and_nothing_else(model, tmp_path):
    x, state = torch.randn(20, 36), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        exact = model(x)
        use_int8_activations(model)
        rounded = model(x)
        layer = model[0]
        assert isinstance(layer, PackedLinear)
        scale = pb.global_scale(model)()
        expected = packed_linear_int8(x, layer.bits, scale, layer._rule.structure, layer._rule.shape, layer.bias)
        assert torch.equal(layer(x), expected)
        assert torch.equal(copy.deepcopy(model)(x), rounded)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), rounded)
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 * exact.abs().max().item())
        assert not torch.equal(rounded, exact)
        assert {name: value.tolist() for name, value in model.state_dict().items()} == {
            name: value.tolist() for name, value in state.items()
        }
        pb.export(model, tmp_path / "net.pt2", (x,), format="pt2")
        program = torch.export.load(tmp_path / "net.pt2").module()
        torch.testing.assert_close(program(x), exact, rtol=1e-5, atol=1e-5)
        use_int8_activations(model, False)
        assert torch.equal(model(x), exact)


def test_a_model_that_cannot_be_switched_is_an_error():
    with pytest.raises(pb.PIBiNNError, match="no PackedLinear"):
        use_int8_activations(nn.Linear(3, 4))


@pytest.mark.parametrize(("columns", "dtype"), [(132104, torch.float32), (132105, torch.float64)])
def test_sums_are_made_in_floats_that_hold_them(columns, dtype, monkeypatch):
    """127 · 132104 is the largest multiple of 127 up to 2²⁴, from where on float32 has no odd numbers."""
    seen = []

    def noted(input, *arguments):
        seen.append(input.dtype)
        return product(input, *arguments)

    product = functional.packed_linear
    monkeypatch.setattr(functional, "packed_linear", noted)
    structure = pb.Banded(0, columns - 1)  # one that the native kernel for blocks does not take
    bits = torch.full((-(-columns // 8),), 255, dtype=torch.uint8)
    with torch.no_grad():
        output = functional.packed_linear_int8(torch.ones(1, columns), bits, torch.ones(1), structure, (1, columns))
    assert seen == [dtype]
    assert output.item() == pytest.approx(columns, rel=1e-6)
