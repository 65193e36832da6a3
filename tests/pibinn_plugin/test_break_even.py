"""Which form a packed linear layer multiplies in: the one that takes less time, with the same values either way."""

import copy

import pytest
import torch
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.functional import kernel
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import keep_unpacked, unpacked_bytes

needs_kernel = pytest.mark.skipif(kernel() == "torch", reason="without the kernel every product reads the weight")


def mask(rows, columns, percent):
    """Exactly so many of all elements."""
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    return pb.Mask((order < rows * columns * percent // 100).view(rows, columns))


# Layer, structure, samples up to which the weight is read, samples from which bits are multiplied (or 0: never).
LINEAR = [
    (nn.Linear(255, 128), None, 1, 2),
    (nn.Linear(256, 128), None, 0, 1),  # (2^15)² · 1 = 2^30
    (nn.Linear(64, 128, bias=False), None, 15, 16),
    (nn.Linear(512, 512), None, 0, 1),
    (nn.Linear(512, 23), None, 300, 0),
    (nn.Linear(23, 512), None, 300, 0),
    (nn.Linear(24, 512), None, 7, 8),
    (nn.Linear(512, 512), mask(512, 512, 12), 0, 1),
    (nn.Linear(512, 512), mask(512, 512, 13), 3, 4),
    (nn.Linear(512, 512), mask(512, 512, 25), 3, 4),
    (nn.Linear(512, 512), mask(512, 512, 26), 300, 0),
    (nn.Linear(512, 512), pb.Banded(15, 15), 0, 1),
    (nn.Linear(512, 512), pb.Banded(16, 16), 3, 4),
    (nn.Linear(512, 512), pb.BlockDiagonal(64), 0, 1),
    (nn.Linear(512, 512), pb.BlockDiagonal(128), 300, 0),  # blocks of 4 × 4
]
# The same, but bits are multiplied up to so many samples, and the weight is read from the next on (or 0: at once).
COMPACT = [
    (CompactLinear(256, 256, pb.BlockDiagonal(16)), None, 32, 33),  # blocks of 16 × 16
    (CompactLinear(768, 256, pb.BlockDiagonal(16)), None, 32, 33),  # 16 × 48, of which the kernel makes 16 × 64
    (CompactLinear(512, 256, pb.BlockDiagonal(8)), None, 300, 0),  # 32 × 64: no more than that for 32 columns
    (CompactLinear(4000, 4000, pb.BlockDiagonal(1000)), None, 0, 1),
    (CompactLinear(64, 64, mask(64, 64, 90)), None, 300, 0),
    (CompactLinear(24, 24, pb.BlockDiagonal(rows=(8, 16), columns=(16, 8))), None, 300, 0),
]


def packed_layer(layer, structure):
    return pb.convert(pb.prepare(copy.deepcopy(layer), {"weight": structure}))


def reads_weight(packed, x):
    """And the product is what it is to be."""
    keep_unpacked(packed)
    packed.eval()
    with torch.no_grad():
        output = packed(x)
        words = (
            0 if packed._rule._words is None or packed._rule._words.words is None else packed._rule._words.words.nbytes
        )
        is_read = unpacked_bytes(packed) > words
        keep_unpacked(packed, False)
        torch.testing.assert_close(output, packed(x), rtol=1e-4, atol=1e-4)
        weight = packed.weight
        expected = (
            x @ weight.T
            if weight.shape == packed._rule.shape
            else packed.structure.linear(x, weight, packed._rule.shape)
        )
        torch.testing.assert_close(
            output, expected if packed.bias is None else expected + packed.bias, rtol=1e-4, atol=1e-4
        )
    return is_read


@needs_kernel
@pytest.mark.parametrize(("layer", "structure", "read_up_to", "bits_from"), LINEAR, ids=repr)
def test_linear_layers_multiply_bits_from_so_many_samples_on(layer, structure, read_up_to, bits_from):
    packed = packed_layer(layer, structure)
    for samples in (1, read_up_to):
        assert samples > read_up_to or reads_weight(packed, torch.randn(samples, layer.in_features))
    for samples in (bits_from, 300):
        assert not bits_from or not samples or not reads_weight(packed, torch.randn(samples, layer.in_features))


@needs_kernel
@pytest.mark.parametrize(("layer", "structure", "bits_up_to", "read_from"), COMPACT, ids=repr)
def test_compact_layers_multiply_bits_up_to_so_many_samples(layer, structure, bits_up_to, read_from):
    packed = packed_layer(layer, structure)
    for samples in (1, bits_up_to):
        assert samples > bits_up_to or not samples or not reads_weight(packed, torch.randn(samples, layer.in_features))
    assert not read_from or reads_weight(packed, torch.randn(read_from, layer.in_features))


@needs_kernel
def test_samples_are_counted_over_all_dimensions_but_the_last():
    packed = packed_layer(nn.Linear(64, 128), None)
    assert reads_weight(packed, torch.randn(3, 1, 5, 64)) and not reads_weight(packed, torch.randn(2, 8, 64))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_multiply_bits_however_small_the_layer(dtype):
    packed = packed_layer(nn.Linear(64, 24), None).to(dtype)
    with torch.no_grad():
        packed(torch.randn(2, 64, dtype=dtype))
    assert packed._rule._kept is None


def operators(packed, x):
    """Of the graph that compiled code runs."""
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(packed, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), packed(x), rtol=1e-4, atol=1e-4)
    return names


@needs_kernel
@pytest.mark.parametrize(
    ("layer", "structure", "operator"),
    [
        (nn.Linear(65, 63), None, "unpack_in_graph"),
        (nn.Linear(64, 64), None, "packed_linear"),
        (nn.Linear(512, 16), None, "unpack_in_graph"),  # narrow: bits never pay
        (nn.Linear(5000, 16), None, "refresh"),
        (nn.Linear(64, 64), mask(64, 64, 2), "packed_linear"),  # zeros are not placed in a graph
        (nn.Linear(512, 512), mask(512, 512, 20), "packed_linear"),
        (nn.Linear(128, 128), mask(128, 128, 50), "packed_linear"),
        (nn.Linear(512, 512), mask(512, 512, 50), "refresh"),
        (CompactLinear(4000, 4000, pb.BlockDiagonal(1000)), None, "unpack_in_graph"),
        (CompactLinear(1504, 1504, pb.BlockDiagonal(47)), None, "packed_linear"),  # 32 × 32, more than 2^15 in all
        (CompactLinear(512, 256, pb.BlockDiagonal(8)), None, "unpack_in_graph"),
        (CompactLinear(3008, 3008, pb.BlockDiagonal(188)), None, "unpack_in_graph"),  # more than 2^15, in 16 × 16
        (CompactLinear(512, 512, pb.Banded(5, 5)), None, "unpack_in_graph"),
        (CompactLinear(512, 512, pb.Banded(10, 10)), None, "packed_linear"),
        (CompactLinear(64, 64, mask(64, 64, 2)), None, "packed_linear"),
    ],
    ids=repr,
)
def test_graphs_multiply_bits_or_unpack_the_weight_whichever_takes_less_time(layer, structure, operator):
    packed = packed_layer(layer, structure)
    names = operators(packed, torch.randn(2, layer.in_features))
    assert [name.split(".")[1] for name in names if name.startswith("pibinn.")] == [operator]


@pytest.mark.parametrize("layer", [nn.Linear(13, 7), nn.Bilinear(3, 4, 5)], ids=repr)
def test_a_program_that_is_exported_through_the_compiler_has_no_operator_of_ours(layer):
    packed = packed_layer(layer, None)
    inputs = (torch.randn(2, 3), torch.randn(2, 4)) if isinstance(layer, nn.Bilinear) else (torch.randn(2, 13),)
    program = torch.export.export(packed, inputs, strict=True)
    assert "pibinn" not in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), packed(*inputs))


def test_a_weight_that_a_graph_unpacks_has_the_gradients_of_the_float_layer():
    packed, x = packed_layer(nn.Linear(13, 7), None), torch.randn(5, 13)
    scale = pb.global_scale(packed).value

    def gradients(layer):
        given = x.clone().requires_grad_()
        return torch.autograd.grad(layer(given).square().sum(), [given, scale, packed.bias])

    for compiled, plain in zip(gradients(torch.compile(packed, fullgraph=True)), gradients(packed), strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Linear(512, 16), nn.Conv2d(8, 8, 3)], ids=repr)
def test_the_number_of_samples_is_no_guard_of_a_graph(layer):
    """Compiled for any number, a packed layer is as many graphs as the float one; exported, it takes any."""
    packed, features = packed_layer(layer, None), (8, 12, 12) if isinstance(layer, nn.Conv2d) else (layer.in_features,)
    # Two numbers below 16, from which on torch itself has other convolutions.
    inputs = [torch.randn(samples, *features) for samples in (2, 14, 40, 4000)]
    counts = []
    for module in (layer, packed):
        graphs = []
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=lambda graph, _, to=graphs: to.append(graph) or graph, dynamic=True)
        with torch.no_grad():
            for x in inputs:
                torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
        counts.append(len(graphs))
    assert counts[0] == counts[1]
    shapes = ({0: torch.export.Dim("batch", max=4096)},)
    with torch.no_grad():
        program = torch.export.export(packed, (inputs[0],), dynamic_shapes=shapes).module()
        for x in inputs:
            torch.testing.assert_close(program(x), packed(x), rtol=1e-4, atol=1e-4)
