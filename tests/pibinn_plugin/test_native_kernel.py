"""The native kernel: every path against float64, and what torch must be able to do with its operators."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import pibinn_plugin as pb
from pibinn_plugin import native_kernel
from pibinn_plugin.functional import kernel, packed_linear, packed_linear_adjoint
from pibinn_plugin.nn import PackedLinear
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parents[1] / "scripts" / "native_kernel_cases.py"
needs_kernel = pytest.mark.skipif(kernel() == "torch", reason="the native kernel was not built, or is switched off")

BLOCKS = [
    (pb.Dense(), (5, 40)),
    (pb.BlockDiagonal(3), (21, 36)),
    (pb.BlockDiagonal(rows=(1, 0, 9), columns=(5, 2, 33)), (10, 40)),
    (pb.BlockDiagonal(2, row_order=(3, 0, 2, 1), column_order=(1, 0, 3, 2)), (4, 4)),
]
OTHERS = [(pb.Banded(1, 2), (4, 6)), (pb.Mask([[1, 0, 1], [0, 1, 1]]), (2, 3))]


def run(arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "PIBINN_KERNEL"}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd="/")


def packed_layer(structure, shape, bias=True):
    packed = PackedSigns.pack(torch.randn(shape), structure, shape)
    return PackedLinear(packed, GlobalScale(0.5), torch.randn(shape[0]) if bias else None, compact=False)


# --------------------------------------------------------------------------------------------------------- values


@needs_kernel
@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
def test_every_path_computes_the_product_in_float64_and_reads_nothing_else(path):
    result = run([str(CASES)], PIBINN_KERNEL=path)
    if "this processor cannot run it" in result.stderr:  # and not an illegal instruction
        assert result.returncode == 1 and f"PIBiNNError: PIBINN_KERNEL={path}" in result.stderr
        assert path != "portable"
        pytest.skip(f"this processor has no {path}")
    assert result.returncode == 0, result.stderr
    name, error = result.stdout.split()
    assert name == path
    assert float(error) <= 1.0


@given(st.sampled_from(BLOCKS + OTHERS), st.sampled_from([(), (1,), (3, 5), (17,), (0,)]), st.integers(0, 2**32))
def test_adjoint_is_the_product_with_the_transpose(case, batch, seed):
    structure, shape = case
    torch.manual_seed(seed)
    layer = packed_layer(structure, shape)
    weight, y = layer.weight.detach().double(), torch.randn(*batch, shape[0])
    x = packed_linear_adjoint(y, layer.bits, layer._scale[0](), structure, shape)
    torch.testing.assert_close(x.double(), y.double() @ weight, rtol=1e-5, atol=1e-5)
    x = packed_linear_adjoint(y.double(), layer.bits, torch.tensor([0.5]), structure, shape)  # in plain torch
    torch.testing.assert_close(x, y.double() @ weight)


@pytest.mark.parametrize(("structure", "shape"), BLOCKS + OTHERS)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_infinite_missing_and_huge_inputs_keep_their_meaning(structure, shape, value):
    layer, x = packed_layer(structure, shape, bias=False), torch.zeros(9, shape[1])
    x[range(9), range(3, 3 + 9) if shape[1] > 12 else [i % shape[1] for i in range(9)]] = value
    blocks = [torch.nonzero(column).flatten() for column in layer.weight.detach().T]
    with torch.no_grad():
        for row in (slice(0, 9), slice(2, 3)):  # many samples, and one
            for sample, y in zip(x[row], layer(x[row]), strict=True):
                column = int(torch.nonzero(sample).item())
                expected = 0.5 * value * layer.weight[blocks[column], column].sign()
                torch.testing.assert_close(y[blocks[column]], expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_what_contiguous_inputs_give(dtype):
    structure, shape = BLOCKS[1]
    layer = packed_layer(structure, shape).to(dtype)
    wide = torch.randn(4, 36, 7, 2, dtype=dtype)
    with torch.no_grad():
        for x in (wide[..., 0].mT, wide[:, :, 3, 0], wide[1:, :, 3, 1].expand(3, 36), wide[0, :, 0, 0].expand(9, 36)):
            assert torch.equal(layer(x), layer(x.contiguous()))


# ------------------------------------------------------------------------------------------------- never out of date


@pytest.mark.parametrize(("structure", "shape"), BLOCKS + OTHERS)
def test_layer_follows_every_change_of_its_bits_scale_and_bias(structure, shape):
    layer, other, x = packed_layer(structure, shape), packed_layer(structure, shape), torch.randn(3, shape[1])

    def check(changed=layer):
        weight, bias = changed.weight.detach().double(), changed.bias.detach().double()
        with torch.no_grad():
            y = changed(x.to(changed.bias.dtype))
        tolerance = 1e-5 if y.dtype == torch.float32 else 0.05
        torch.testing.assert_close(y.double(), x.double() @ weight.T + bias, rtol=tolerance, atol=tolerance)

    check()
    for change in (
        lambda: layer._scale[0].set(0.7),
        lambda: layer.bits.data.bitwise_not_(),
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: layer.bits.data.bitwise_not_(),
        lambda: layer.load_state_dict(other.state_dict(), assign=True),
        lambda: layer.bias.data.neg_(),
        lambda: setattr(layer, "bits", layer.bits.bitwise_not()),
    ):
        before = layer(x)
        change()
        assert not torch.equal(layer(x), before)
        check()
    check(copy.deepcopy(layer))
    check(copy.deepcopy(layer).to(torch.bfloat16))
    swapped = torch.func.functional_call(layer, {"bits": ~layer.bits, "bias": torch.zeros_like(layer.bias)}, x)
    torch.testing.assert_close(swapped, -x @ layer.weight.T)


@pytest.mark.parametrize("value", [-0.3, 0.0, 1e-45, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_takes_the_scale_as_the_global_scale_gives_it(value, dtype):
    layer = packed_layer(pb.BlockDiagonal(2), (4, 6), bias=False)
    layer._scale[0].to(dtype).value.data.fill_(value)
    x = torch.randn(3, 6) * 1e30
    with torch.no_grad():
        fused = layer(x)
    differentiable = layer(x)
    assert differentiable.requires_grad
    torch.testing.assert_close(fused, differentiable.detach(), equal_nan=True)


# ------------------------------------------------------------------------------------- gradients, tracing, compiling


@pytest.mark.parametrize(("structure", "shape"), BLOCKS)
def test_gradients_are_those_of_the_dense_product(structure, shape):
    layer = packed_layer(structure, shape)
    x, direction = torch.randn(3, shape[1], requires_grad=True), torch.randn(3, shape[1])
    signs = layer.weight.detach().sign()

    def derivatives(function):
        loss = function(x, layer._scale[0].value, layer.bias).sin().sum()
        first = torch.autograd.grad(loss, (x, layer._scale[0].value, layer.bias), create_graph=True)
        return *first, *torch.autograd.grad((first[0] * direction).sum(), (x, layer._scale[0].value, layer.bias))

    packed = derivatives(lambda x, s, b: packed_linear(x, layer.bits, s, structure, shape, b))
    dense = derivatives(lambda x, s, b: x @ (s * signs).T + b)
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("transposed", [False, True])
def test_operators_keep_the_rules_of_torch(transposed):
    """`opcheck` runs the schema, the fake kernel, the gradient and the compiler over an operator."""
    uneven = packed_layer(*BLOCKS[2])
    operators, scale = torch.ops.pibinn, torch.tensor([0.5])
    x = torch.randn(3, 10 if transposed else 40)
    bias = None if transposed else torch.randn(10)
    opcheck(operators.packed_linear.uneven, (x, uneven.bits, scale, [1, 0, 9], [5, 2, 33], bias, transposed))
    opcheck(operators.sign_product.uneven, (x.clone().requires_grad_(), uneven.bits, [1, 0, 9], [5, 2, 33], transposed))
    even = packed_layer(*BLOCKS[1])
    x = torch.randn(2, 3, 21 if transposed else 36)
    opcheck(operators.packed_linear.default, (x, even.bits, scale, 7, 12, None, transposed, True))
    opcheck(operators.sign_product.default, (x.requires_grad_(), even.bits, 7, 12, transposed))


def graphs_of(function, *inputs):
    """The operators in the graphs that torch.compile makes of a function."""
    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    return [name for name in names if name.startswith("pibinn.")]


@needs_kernel
def test_compiled_layers_call_the_kernel_and_exported_programs_do_not():
    layer, x = packed_layer(*BLOCKS[1]), torch.randn(3, 36)
    with torch.no_grad():
        assert graphs_of(layer, x) == ["pibinn.packed_linear.default"]
    torch._dynamo.reset()  # the graph without gradients
    assert graphs_of(layer, x) == ["pibinn.sign_product.default"]
    program = torch.export.export(layer.requires_grad_(False), (x,))
    assert "pibinn" not in str(program.graph)


@needs_kernel
def test_compiled_training_step_is_the_eager_one():
    model = torch.nn.Sequential(packed_layer(*BLOCKS[1]), torch.nn.Tanh(), packed_layer(pb.Dense(), (4, 21)))
    x, gradients = torch.randn(9, 36), []
    scales = [model[0]._scale[0].value, model[2]._scale[0].value]
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        gradients.append(torch.autograd.grad(function(x).square().sum(), [*model.parameters(), *scales]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- loading


def test_without_the_shared_object_everything_runs_on_torch(tmp_path):
    shutil.copytree(
        ROOT / "pibinn_plugin", tmp_path / "pibinn_plugin", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = (
        "import torch, pibinn_plugin as pb\n"
        "from pibinn_plugin.functional import kernel\n"
        "print(kernel(), pb.convert(pb.prepare(torch.nn.Linear(8, 4), {'weight': None}))(torch.ones(8)).shape)"
    )
    result = run(["-c", code], PYTHONPATH=str(tmp_path))
    assert result.stdout == "torch torch.Size([4])\n" and result.stderr == ""
    result = run(["-c", code], PYTHONPATH=str(tmp_path), PIBINN_KERNEL="avx2")
    assert "PIBINN_KERNEL='avx2', but the native kernel cannot be used: it was not built" in result.stderr


def test_forced_paths():
    code = "from pibinn_plugin.functional import kernel; print(kernel())"
    assert run(["-c", code], PIBINN_KERNEL="torch").stdout == "torch\n"
    assert "expected torch, portable, avx2 or avx512" in run(["-c", code], PIBINN_KERNEL="sse").stderr


@needs_kernel
def test_shared_object_of_other_sources_is_left_alone(monkeypatch):
    monkeypatch.setattr(native_kernel, "_INTERFACE", -1)
    monkeypatch.delenv("PIBINN_KERNEL", raising=False)
    assert native_kernel._load() == "torch"
    monkeypatch.setenv("PIBINN_KERNEL", "portable")
    with pytest.raises(pb.PIBiNNError, match="was built from other sources"):
        native_kernel._load()
