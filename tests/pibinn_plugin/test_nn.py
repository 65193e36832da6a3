"""Compact layers against ``nn.Linear`` with the same dense weight, packed layers against the layers they replace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pibinn_plugin import StructureError, convert, prepare
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, CompactLinear, PackedConv, PackedLinear
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.structure import Banded, BlockDiagonal, Mask

LAYERS = [
    lambda **kwargs: BlockDiagonalLinear(6, 4, 2, **kwargs),
    lambda **kwargs: BlockDiagonalLinear(3, 4, BlockDiagonal(rows=(1, 3), columns=(1, 2)), **kwargs),
    lambda **kwargs: BandedLinear(6, 5, 1, 2, **kwargs),
    lambda **kwargs: CompactLinear(3, 3, Mask(torch.eye(3)), **kwargs),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_compact_layer_is_the_linear_layer_with_its_dense_weight(make, bias):
    layer = make(bias=bias, dtype=torch.float64)
    twin = nn.Linear(layer.in_features, layer.out_features, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        twin.weight.copy_(layer.structure.to_dense(layer.weight, layer.dense_shape))
        if bias:
            twin.bias.copy_(layer.bias)
    input = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    twin_input = input.detach().clone().requires_grad_()
    layer(input).square().sum().backward()
    twin(twin_input).square().sum().backward()
    torch.testing.assert_close(layer(input), twin(twin_input))
    torch.testing.assert_close(input.grad, twin_input.grad)
    torch.testing.assert_close(layer.weight.grad, layer.structure.to_compact(twin.weight.grad))
    assert layer.dense_shape == twin.weight.shape


def test_memory_and_parameters_go_with_the_structural_nonzeros():
    layer = BlockDiagonalLinear(512, 512, 64)
    assert layer.weight.shape == (64, 8, 8)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 512 * 8 + 512
    assert BandedLinear(100, 100, 1, 1).weight.numel() == 298


def test_initialisation_has_the_spread_of_a_linear_layer_of_the_same_fan_in():
    layer = BlockDiagonalLinear(512, 512, 32)  # sixteen inputs to an output
    assert layer.weight.abs().max() <= 0.25
    assert layer.weight.abs().max() > 0.24
    assert layer.bias.abs().max() <= 0.25


@pytest.mark.parametrize(
    "make",
    [lambda: BlockDiagonalLinear(6, 4, 3), lambda: BandedLinear(3, 3, 3, 0), lambda: CompactLinear(3, 3, Mask([[1]]))],
)
def test_structure_that_does_not_fit_is_refused(make):
    with pytest.raises(StructureError):
        make()


@pytest.mark.parametrize("make", LAYERS)
def test_packed_linear_replaces_a_compact_layer(make):
    layer = prepare(make(), {"weight": None})
    packed = convert(layer)
    assert type(packed) is PackedLinear
    assert torch.equal(packed.weight, layer.weight)  # in the form that the layer had: compact
    input = torch.randn(5, packed.shape[1])
    torch.testing.assert_close(packed(input), layer(input))


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular", bias=False),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=2, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"),
    nn.Conv3d(4, 6, 2, padding="valid"),
]


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_packed_convolution_keeps_every_argument_of_the_layer_it_replaces(convolution):
    prepared = prepare(nn.Sequential(copy.deepcopy(convolution)), {"0.weight": None})
    packed = convert(prepared)
    assert type(packed[0]) is PackedConv
    assert torch.equal(packed[0].weight, prepared[0].weight)
    twin = copy.deepcopy(convolution)
    with torch.no_grad():
        twin.weight.copy_(prepared[0].weight)
    input = torch.randn(2, 4, *(8,) * (convolution.weight.dim() - 2))
    torch.testing.assert_close(packed(input), twin(input))
    one = input[0]  # without a batch dimension
    torch.testing.assert_close(packed(one), twin(one))


def test_packed_layers_hold_bits_and_no_latent():
    scale = GlobalScale(0.5)
    layer = PackedLinear(PackedSigns.pack(torch.randn(16, 16), BlockDiagonal(4), (16, 16)), scale, None, False)
    assert list(layer.parameters()) == []  # λ is referenced, not owned
    state = layer.state_dict()
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(["bits", "_extra_state"], torch.uint8)
    assert state["bits"].numel() == 8
    scale.set(2.0)
    input = torch.randn(16)
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight))
    assert layer.weight.abs().max() == 2.0


def test_packed_layer_refuses_the_state_of_another_structure():
    shape, scale = (4, 4), GlobalScale(0.5)
    one = PackedLinear(PackedSigns.pack(torch.randn(shape), BlockDiagonal(2), shape), scale, None, False)
    other = PackedLinear(PackedSigns.pack(torch.randn(shape), Banded(0, 1), shape), scale, None, False)
    with pytest.raises(StructureError, match=r"blocks=2"):
        other.load_state_dict(one.state_dict())
