"""Masks and bands in the native kernel: their index, and the products that read it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_layers import packed_layer
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import pibinn_plugin as pb
from pibinn_plugin.functional import kernel, packed_linear, packed_linear_adjoint
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.structure.sparse_rows import sparse_rows

needs_kernel = pytest.mark.skipif(kernel() == "torch", reason="the native kernel was not built, or is switched off")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = [torch.float32] if kernel() == "torch" else list(ROUNDING)  # the kernel alone sums 16 bits in 32
PATTERN = torch.zeros(40, 70, dtype=torch.bool)
PATTERN[3:30] = torch.rand(27, 70, generator=torch.Generator().manual_seed(0)) < 0.2


def cases():
    """A new structure each time, without what the last test left on it."""
    return [(pb.Mask(PATTERN), (40, 70)), (pb.Banded(2, 9), (40, 70)), (pb.Banded(5, 0), (9, 6))]


@st.composite
def weights(draw):
    """A mask, of no or of all elements in a row, or a band, with its shape."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    if draw(st.booleans()):
        return pb.Banded(draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))), (rows, columns)
    torch.manual_seed(draw(st.integers(0, 2**32)))
    pattern = torch.rand(rows, columns) < draw(st.sampled_from([0.005, 0.02, 0.1, 0.5, 1.0]))
    pattern[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = True
    return pb.Mask(pattern), (rows, columns)


# --------------------------------------------------------------------------------------------------------- values


@given(weights())
def test_index_is_that_of_the_positions(weight):
    structure, (rows, columns) = weight
    index, positions = sparse_rows(structure, (rows, columns)).numpy(), structure.positions((rows, columns)).numpy()
    starts, column, places = np.split(index, [rows + 1, rows + 1 + len(positions)])
    row = np.repeat(np.arange(rows), np.diff(starts))
    order = places if len(places) else np.arange(len(positions))
    assert np.array_equal(row * columns + column, positions[order])
    assert (np.diff(positions[order]) > 0).all()


class AskedForPositionsError(Exception):
    pass


def test_what_32_bits_cannot_count_has_no_index_and_nothing_is_made_for_it(monkeypatch):
    def positions(structure, shape):
        raise AskedForPositionsError

    monkeypatch.setattr(pb.Banded, "positions", positions)
    for shape in ((2**31 - 1, 4), (4, 2**31 - 1)):
        with pytest.raises(AskedForPositionsError):
            sparse_rows(pb.Banded(0, 0), shape)
    for shape, upper in (((2**31, 4), 0), ((4, 2**31), 0), ((2**16, 2**16), 2**16 - 1)):
        assert sparse_rows(pb.Banded(0, upper), shape) is None


@given(
    weights(),
    st.sampled_from([(), (0,), (1,), (3,), (2, 4), (33,)]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_products_are_those_of_the_dense_matrix(weight, batch, dtype, strided, has_bias, seed):
    structure, shape = weight
    torch.manual_seed(seed)
    packed = PackedSigns.pack(torch.randn(shape), structure, shape)
    matrix = 0.3 * packed.weight(torch.ones(1), False, torch.float64)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None

    def check(product, matrix, offset):
        x = torch.randn(*batch, (1 + strided) * matrix.shape[1]).to(dtype)[..., -matrix.shape[1] :]
        y = product(x)
        assert y.dtype == dtype
        expected, magnitude = x.double() @ matrix.T + offset, x.double().abs() @ matrix.T.abs() + abs(offset)
        spacing = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # of subnormal results, rounded to the nearest
        assert ((y.double() - expected).abs() <= ROUNDING[dtype] * magnitude + spacing / 2).all()

    scale, offset = torch.tensor([0.3]), torch.zeros(()) if bias is None else bias.double()
    check(lambda x: packed_linear(x, packed.bits, scale, structure, shape, bias), matrix, offset)
    check(lambda x: packed_linear_adjoint(x, packed.bits, scale, structure, shape), matrix.T, torch.zeros(()))


@pytest.mark.parametrize("case", range(3))
def test_gradients_are_those_of_the_dense_product(case):
    structure, shape = cases()[case]
    layer = packed_layer(structure, shape)
    signs, scale = layer.weight.detach().sign(), layer._rule.scale.value

    def derivatives(function, inputs, *parameters):
        x = torch.randn(9, inputs, generator=torch.Generator().manual_seed(1)).requires_grad_()
        first = torch.autograd.grad(function(x, *parameters).sin().sum(), (x, *parameters), create_graph=True)
        return *first, *torch.autograd.grad(first[0].cos().sum(), (x, *parameters), allow_unused=True)

    packed = derivatives(
        lambda x, s, b: packed_linear(x, layer.bits, s, structure, shape, b), shape[1], scale, layer.bias
    )
    dense = derivatives(lambda x, s, b: x @ (s * signs).T + b, shape[1], scale, layer.bias)
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)
    packed = derivatives(lambda x, s: packed_linear_adjoint(x, layer.bits, s, structure, shape), shape[0], scale)
    dense = derivatives(lambda x, s: x @ (s * signs), shape[0], scale)
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ derived, and never out of date


def test_index_is_made_once_and_is_no_part_of_what_a_structure_is():
    for structure, shape in cases():
        fresh, text, data = copy.deepcopy(structure), structure.to_json(), structure.to_bytes()
        index = sparse_rows(structure, shape)
        assert sparse_rows(structure, shape) is index
        assert (structure, hash(structure), repr(structure)) == (fresh, hash(fresh), repr(fresh))
        assert (structure.to_json(), structure.to_bytes()) == (text, data)
        for copied in (copy.deepcopy(structure), pickle.loads(pickle.dumps(structure))):
            assert copied == structure
            assert torch.equal(sparse_rows(copied, shape), index)
    band = pb.Banded(1, 1)  # of any shape
    assert [len(sparse_rows(band, (n, n))) for n in (3, 5, 3)] == [4 + 2 * 7, 6 + 2 * 13, 4 + 2 * 7]


@pytest.mark.parametrize("case", range(3))
def test_layer_stores_bits_alone_and_its_copies_are_its_equals(case):
    structure, shape = cases()[case]
    layer, x = packed_layer(structure, shape), torch.randn(4, shape[1])
    with torch.no_grad():
        expected = layer(x)
        assert set(layer.state_dict()) == {
            "parametrizations.weight.original",
            "bias",
            "parametrizations.weight.0._extra_state",
        }
        assert layer.state_dict()["parametrizations.weight.0._extra_state"].numel() == len(structure.to_bytes())
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            copied.bits.bitwise_not_()
            torch.testing.assert_close(copied(x) - layer.bias, layer.bias - expected)
        assert torch.equal(layer(x), expected)


@needs_kernel
@pytest.mark.parametrize("case", range(3))
def test_layer_stays_packed_but_in_what_is_exported(case):
    structure, shape = cases()[case]
    layer, stays = packed_layer(structure, shape), []
    x = torch.randn(3, shape[1])

    class Asks(torch.nn.Module):
        def forward(self, x):
            stays.append(layer.stays_packed(x))
            return x * 2

    Asks()(x)
    torch.export.export(Asks(), (x,))
    assert stays[0] and not any(stays[1:]) and len(stays) > 1
    assert not layer.stays_packed(x.double())


# -------------------------------------------------------------------------------------------- tracing and compiling


@needs_kernel
@pytest.mark.parametrize("overload", ["sparse", "sparse_unchecked"])
@pytest.mark.parametrize("transposed", [False, True])
def test_operators_keep_the_rules_of_torch(transposed, overload):
    for structure, shape in cases():
        bits, index = packed_layer(structure, shape).bits, sparse_rows(structure, shape)
        x = torch.randn(3, shape[0] if transposed else shape[1])
        bias = None if transposed else torch.randn(shape[0])
        arguments = (x, bits, torch.tensor([0.5]), index, shape, bias, transposed)
        opcheck(getattr(torch.ops.pibinn.packed_linear, overload), arguments)
        arguments = (x.clone().requires_grad_(), bits, index, shape, transposed)
        opcheck(getattr(torch.ops.pibinn.sign_product, overload), arguments)


def operators_of(function, *inputs):
    """The result of a compiled function, and the kernel's operators in its graphs."""
    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    result = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    return result, [name for name in names if name.startswith("pibinn.")]


@needs_kernel
@pytest.mark.parametrize("case", range(3))
def test_compiled_layers_call_the_kernel_and_exported_programs_do_not(case):
    layer = packed_layer(*cases()[case])
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        result, operators = operators_of(layer, x)
        torch.testing.assert_close(result, layer(x))
    assert operators == ["pibinn.packed_linear.sparse_unchecked"]
    for function, input in ((layer, x), (layer.adjoint, layer(x))):
        assert operators_of(function, input)[1] == ["pibinn.sign_product.sparse_unchecked"]
    program = torch.export.export(layer.requires_grad_(False), (x,))
    assert "pibinn" not in str(program.graph)
    numbers = [
        value for value in [*program.constants.values(), *program.state_dict.values()] if value.dtype == torch.int32
    ]
    assert all(value.tolist() == [1, 2, 4, 8, 16, 32, 64, 128] for value in numbers)  # of the bits, none of an index


@pytest.mark.parametrize("case", range(3))
def test_a_layer_runs_on_fake_tensors(case):
    structure, shape = cases()[case]
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0]))
    packed, x = pb.convert(pb.prepare(model, {"0.weight": structure})), torch.randn(3, shape[1])
    with FakeTensorMode() as mode, torch.no_grad():
        state = {name: mode.from_tensor(value) for name, value in [*packed.named_parameters(), *packed.named_buffers()]}
        fake = torch.func.functional_call(packed, state, (mode.from_tensor(x),))
    assert fake.shape == (3, shape[0])


@pytest.mark.parametrize("case", range(3))
def test_first_use_in_a_trace_leaves_nothing_of_it_behind(case):
    structure, shape = cases()[case]
    bits, scale, x = packed_layer(structure, shape).bits, torch.tensor([0.5]), torch.randn(3, shape[1])
    expected = packed_linear(x, bits, scale, structure, shape)

    def product(x, bits, structure):
        return packed_linear(x, bits, scale, structure, shape)

    fresh, _ = cases()[case]
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bits, fresh), expected)
    torch.testing.assert_close(product(x, bits, fresh), expected)
    torch.testing.assert_close(compiled(x, bits, fresh), expected)
    fresh, _ = cases()[case]
    with FakeTensorMode() as mode:
        fake = packed_linear(mode.from_tensor(x), mode.from_tensor(bits), mode.from_tensor(scale), fresh, shape)
    assert fake.shape == expected.shape
    torch.testing.assert_close(product(x, bits, fresh), expected)
    fresh, _ = cases()[case]
    with torch.inference_mode():
        product(x, bits, fresh)
    product(x.requires_grad_(), bits, fresh).sum().backward()


@needs_kernel
def test_compiled_training_step_is_the_eager_one():
    layers = [packed_layer(*case) for case in (cases()[1], (pb.Mask(PATTERN.T), (70, 40)))]
    model, x, gradients = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1]), torch.randn(9, 70), []
    scales = [layer._rule.scale.value for layer in layers]
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        gradients.append(torch.autograd.grad(function(x).square().sum(), [*model.parameters(), *scales]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", range(3))
def test_vmap_and_jvp_are_those_of_the_dense_product(case):
    structure, shape = cases()[case]
    layer, x = packed_layer(structure, shape, bias=False), torch.randn(5, shape[1])
    weight = layer.weight.detach()

    def product(x):
        return packed_linear(x, layer.bits, torch.tensor([0.5]), structure, shape)

    torch.testing.assert_close(torch.func.vmap(product)(x), x @ weight.T)
    torch.testing.assert_close(torch.func.jvp(product, (x[0],), (x[1],))[1], weight @ x[1])
