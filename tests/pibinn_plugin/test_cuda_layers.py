"""Packed layers on a CUDA device give what they give on a CPU, by Triton or by the unpacked weight."""

import copy

import pytest
import torch
from packed_layers import BLOCKS, OTHERS, PackedModel, packed_layer
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.functional import packed_linear, packed_linear_adjoint
from pibinn_plugin.kernel import native
from pibinn_plugin.nn import CompactLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}
CASES = [
    *BLOCKS,
    *OTHERS,
    (pb.Dense(), (130, 257)),
    (pb.BlockDiagonal(4), (256, 512)),
    (pb.BlockDiagonal(16), (1024, 2048)),
    (pb.BlockDiagonal(rows=(64, 100), columns=(128, 30)), (164, 158)),
    (pb.Mask(torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) < 0.2), (64, 96)),
    (pb.Banded(3, 5), (64, 64)),
]


def is_multiplied(structure):
    is_equal = isinstance(structure, pb.BlockDiagonal) and structure.rows is None and structure.row_order is None
    return native._HAS_TRITON and (is_equal or isinstance(structure, pb.Dense))


@pytest.mark.parametrize(("structure", "shape"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_layers_on_a_device_give_what_they_give_on_a_cpu(structure, shape, dtype):
    model = PackedModel(structure, shape).to(dtype)
    layer, moved = model.layer, copy.deepcopy(model).cuda().layer
    tolerance = TOLERANCES[dtype]
    for context, batches in (
        (torch.no_grad, [(), (1,), (40,), (0,), (2, 3)]),
        (torch.inference_mode, [(2, 3)]),
        (torch.enable_grad, [(2, 3)]),
    ):
        for batch in batches:
            x = torch.randn(*batch, shape[1]).to(dtype)
            with context():
                y = moved(x.cuda())
                torch.testing.assert_close(y.cpu(), layer(x), rtol=tolerance, atol=tolerance)
                adjoint = moved.adjoint(y)
                torch.testing.assert_close(adjoint.cpu(), layer.adjoint(y.cpu()), rtol=tolerance, atol=4 * tolerance)
    assert moved.stays_packed(x.cuda()) == (is_multiplied(structure) and dtype != torch.float64)


@pytest.mark.parametrize(("structure", "shape"), CASES)
def test_gradients_on_a_device_are_those_of_a_cpu(structure, shape):
    model, results = PackedModel(structure, shape), []
    layer, moved = model.layer, copy.deepcopy(model).cuda().layer
    x, direction = torch.randn(5, shape[1]), torch.randn(5, shape[0])
    for each, device in ((layer, "cpu"), (moved, "cuda")):
        leaf = x.to(device, copy=True).requires_grad_()
        (each(leaf) * direction.to(device)).sum().backward()
        results.append([leaf.grad.cpu(), each.bias.grad.cpu(), each._rule.scale.value.grad.cpu()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("structure", "shape"), CASES)
def test_functions_on_a_device_give_what_they_give_on_a_cpu(structure, shape):
    layer, x, y = packed_layer(structure, shape), torch.randn(3, shape[1]), torch.randn(3, shape[0])
    for function, argument in ((packed_linear, x), (packed_linear_adjoint, y)):
        tensors = (argument, layer.bits, torch.tensor([0.5]))
        moved = function(*(each.cuda() for each in tensors), structure, shape)
        torch.testing.assert_close(moved.cpu(), function(*tensors, structure, shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["native", "torchao"])
def test_converted_networks_run_eager_compiled_and_captured(scheme):
    if scheme == "torchao":
        pytest.importorskip("torchao")
    model = nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), CompactLinear(96, 192, pb.BlockDiagonal(3)), nn.ReLU(), nn.Linear(192, 40)
    )
    structures = {"0.weight": None, "2.weight": None, "4.weight": pb.Banded(3, 160)}
    packed = pb.convert(pb.prepare(model, structures, scheme))
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = packed(x)
        moved, x = packed.cuda(), x.cuda()
        torch.testing.assert_close(moved(x).cpu(), expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(moved, fullgraph=True)
        torch.testing.assert_close(compiled(x).cpu(), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(moved(x).float().cpu(), expected, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_captured_graphs_read_the_scale_and_the_bits_of_each_replay(batch):
    layer, x = PackedModel(pb.BlockDiagonal(2), (256, 512)).cuda().layer, torch.randn(batch, 512, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layer(x)  # compiles the kernel
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(x)
        for change in (lambda: None, lambda: layer._rule.scale.set(0.7), lambda: layer.bits.bitwise_not_()):
            change()
            x.normal_()
            graph.replay()
            torch.testing.assert_close(y, layer(x), rtol=0, atol=0)


def test_convolutions_on_a_device_are_those_of_the_weight():
    packed = pb.convert(pb.prepare(nn.Sequential(nn.Conv2d(16, 8, 3), nn.Conv2d(8, 4, 1)), {"*.weight": None}))
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        expected = packed(x)
        torch.testing.assert_close(packed.cuda()(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)  # cuDNN's TF32
