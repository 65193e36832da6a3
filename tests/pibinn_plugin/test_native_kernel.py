"""The native kernel: what torch must be able to do with its operators, how it is loaded, and each of its paths."""

import shutil
from pathlib import Path

import pytest
import torch
from fresh_process import run_code
from packed_layers import BLOCKS, packed_layer
from torch.library import opcheck

import pibinn_plugin as pb
from pibinn_plugin.functional import kernel, packed_linear
from pibinn_plugin.kernel import cpu

ROOT = Path(__file__).parents[2]
CASES = "import runpy; runpy.run_module('native_kernel_cases', run_name='__main__')"
needs_kernel = pytest.mark.skipif(kernel() == "torch", reason="the native kernel was not built, or is switched off")


# ------------------------------------------------------------------------------------- gradients, tracing, compiling


@pytest.mark.parametrize(("structure", "shape"), BLOCKS)
def test_gradients_are_those_of_the_dense_product(structure, shape):
    layer = packed_layer(structure, shape)
    x, direction = torch.randn(3, shape[1], requires_grad=True), torch.randn(3, shape[1])
    signs = layer.weight.detach().sign()

    def derivatives(function):
        loss = function(x, layer._rule.scale.value, layer.bias).sin().sum()
        first = torch.autograd.grad(loss, (x, layer._rule.scale.value, layer.bias), create_graph=True)
        return *first, *torch.autograd.grad((first[0] * direction).sum(), (x, layer._rule.scale.value, layer.bias))

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
    opcheck(operators.prepare, (uneven.bits, [1, 0, 9], [5, 2, 33]))
    opcheck(operators.unpack, (uneven.bits, scale, 302, torch.bfloat16))
    for weight, positions in ((torch.empty(302), None), (torch.empty(400), torch.randperm(400)[:302])):
        seen = torch.zeros(42, dtype=torch.uint8)
        opcheck(operators.refresh, (weight, seen, uneven.bits, scale, positions))
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
    scales = [model[0]._rule.scale.value, model[2]._rule.scale.value]
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        gradients.append(torch.autograd.grad(function(x).square().sum(), [*model.parameters(), *scales]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ paths and loading


@needs_kernel
@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
def test_every_path_computes_the_product_in_float64_and_reads_nothing_else(path):
    result = run_code(CASES, check=False, PIBINN_KERNEL=path)
    if "this processor cannot run it" in result.stderr:  # and not an illegal instruction
        assert result.returncode == 1 and f"PIBiNNError: PIBINN_KERNEL={path}" in result.stderr
        assert path != "portable"
        pytest.skip(f"this processor has no {path}")
    assert result.returncode == 0, result.stderr
    name, error = result.stdout.split()
    assert name == path
    assert float(error) <= 1.0


def test_without_the_shared_object_everything_runs_on_torch(tmp_path):
    shutil.copytree(
        ROOT / "pibinn_plugin", tmp_path / "pibinn_plugin", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, pibinn_plugin as pb\n"
        "from pibinn_plugin.functional import kernel\n"
        "print(kernel(), pb.convert(pb.prepare(torch.nn.Linear(8, 4), {'weight': None}))(torch.ones(8)).shape)"
    )
    result = run_code(code, PIBINN_KERNEL="")
    assert result.stdout == "torch torch.Size([4])\n"
    assert result.stderr.count("packed weights run in plain torch") == 1 and "it was not built" in result.stderr
    result = run_code(code, check=False, PIBINN_KERNEL="avx2")
    assert "PIBINN_KERNEL='avx2', but the native kernel cannot be used: it was not built" in result.stderr


def test_forced_paths():
    code = "from pibinn_plugin.functional import kernel; print(kernel())"
    assert run_code(code, PIBINN_KERNEL="torch").stdout == "torch\n"
    assert "expected torch, portable, avx2 or avx512" in run_code(code, check=False, PIBINN_KERNEL="sse").stderr


@needs_kernel
def test_shared_object_of_other_sources_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_INTERFACE", -1)
    monkeypatch.delenv("PIBINN_KERNEL", raising=False)
    assert cpu.load() == ("torch", "_kernel.so was built from other sources")
    monkeypatch.setenv("PIBINN_KERNEL", "portable")
    with pytest.raises(pb.PIBiNNError, match=r"was built from other sources"):
        cpu.load()
