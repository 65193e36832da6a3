"""What the native kernel takes: everything else is computed by torch, never misread."""

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.kernel import native

pytestmark = pytest.mark.skipif(native.kernel() == "torch", reason="there is no native kernel here")


def arguments(**changes):
    tensors = {
        "input": torch.ones(3, 8),
        "bits": torch.zeros(8, dtype=torch.uint8),
        "scale": torch.ones(1),
        "bias": torch.ones(8),
    }
    return {**tensors, **changes}


class Own(torch.Tensor):
    """A tensor with products of its own."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": None},
        {"input": torch.ones(3, 8).bfloat16(), "bias": torch.ones(8).bfloat16()},
        {"input": torch.ones(3, 8).half(), "bias": torch.ones(8).half(), "scale": torch.ones(1).bfloat16()},
        {"input": nn.Parameter(torch.ones(3, 8)), "bias": nn.Parameter(torch.ones(8))},
    ],
)
def test_what_the_kernel_takes(changes):
    assert native.can_run(**arguments(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"input": torch.ones(3, 8).double(), "bias": torch.ones(8).double()},
        {"input": torch.ones(3, 8).int(), "bias": None},
        {"input": torch.ones(3, 8, device="meta")},
        {"input": torch.ones(3, 8).to_sparse()},
        {"input": torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])},
        {"input": torch.ones(3, 8).as_subclass(Own)},
        {"bits": torch.zeros(8, dtype=torch.uint8, device="meta")},
        {"bits": torch.zeros(8, dtype=torch.uint8).as_subclass(Own)},
        {"scale": torch.ones(1, device="meta")},
        {"scale": torch.ones(1).double()},
        {"scale": torch.ones(1).as_subclass(Own)},
        {"bias": torch.ones(8).double()},
        {"bias": torch.ones(8).bfloat16()},
        {"bias": torch.ones(8).as_subclass(Own)},
    ],
    ids=str,
)
def test_what_it_leaves_to_torch(changes):
    assert not native.can_run(**arguments(**changes))


def test_it_runs_under_no_transform():
    seen = []

    def noted(x):
        seen.append(native.can_run(**arguments()))
        return x

    torch.func.vmap(noted)(torch.ones(2))
    with forward_mode.dual_level():
        noted(torch.ones(2))
    torch.jit.trace(noted, torch.ones(2), check_trace=False)
    assert seen == [False] * 3
    assert native.can_run(**arguments())


STRUCTURES = [pb.Dense(), pb.BlockDiagonal(2), pb.Banded(1, 2), pb.Mask(torch.eye(8))]


def layers(structure):
    layer = pb.prepare(nn.Linear(8, 8), {"weight": structure})
    return layer, pb.convert(layer)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("gradient", [True, False])
def test_forward_mode_derivatives_are_those_of_the_weight(structure, gradient):
    layer, packed = layers(structure)
    x, direction = torch.randn(3, 8), torch.randn(3, 8)
    with torch.set_grad_enabled(gradient), forward_mode.dual_level():
        tangent = forward_mode.unpack_dual(packed(forward_mode.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, direction @ layer.weight.mT)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_multiplied_one_by_one(layout):
    layer, packed = layers(pb.Dense())
    parts = [torch.randn(2, 8), torch.randn(5, 8)]
    with torch.no_grad():
        outputs = packed(torch.nested.nested_tensor(parts, layout=layout)).unbind()
        for output, part in zip(outputs, parts, strict=True):
            torch.testing.assert_close(output, layer(part))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("gradient", [True, False])
def test_a_bias_of_another_dtype_is_what_it_is_to_torch(structure, gradient):
    """float32 plus a float64 bias is float64; the kernel would read its bytes as float32."""
    layer, packed = layers(structure)
    packed.bias = nn.Parameter(layer.bias.detach().double())
    x = torch.randn(3, 8)
    with torch.set_grad_enabled(gradient):
        output = packed(x)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), layer(x))
