"""Compact layers against ``nn.Linear`` with the same dense weight, packed layers against the layers they replace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from pibinn_plugin import PIBiNNError, StructureError, convert, global_scale, prepare
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, CompactLinear
from pibinn_plugin.packed import PackedCompactLinear
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
    assert isinstance(packed, PackedCompactLinear)
    assert torch.equal(packed.weight, layer.weight)  # in the form that the layer had: compact
    input = torch.randn(5, packed.in_features)
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
    assert isinstance(packed[0], type(convolution))
    assert torch.equal(packed[0].weight, prepared[0].weight)
    twin = copy.deepcopy(convolution)
    with torch.no_grad():
        twin.weight.copy_(prepared[0].weight)
    input = torch.randn(2, 4, *(8,) * (convolution.weight.dim() - 2))
    torch.testing.assert_close(packed(input), twin(input))
    one = input[0]  # without a batch dimension
    torch.testing.assert_close(packed(one), twin(one))


def packed_linear(structure, size):
    return convert(prepare(nn.Linear(size, size, bias=False), {"weight": structure}))


def test_packed_layers_hold_bits_and_no_latent():
    layer = packed_linear(BlockDiagonal(4), 16)
    assert [name for name, _ in layer.named_parameters()] == ["pibinn_scale.value"]
    bits, structure = "parametrizations.weight.original", "parametrizations.weight.0._extra_state"
    state = layer.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "pibinn_scale.value": torch.float32,
        bits: torch.uint8,
        structure: torch.uint8,
    }
    assert state[bits].numel() == 8
    global_scale(layer).set(2.0)
    input = torch.randn(16)
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight))
    assert layer.weight.abs().max() == 2.0


def test_packed_layer_refuses_the_state_of_another_structure():
    one, other = packed_linear(BlockDiagonal(2), 4), packed_linear(Banded(0, 1), 4)
    with pytest.raises(StructureError, match=r"blocks=2"):
        other.load_state_dict(one.state_dict())


def test_a_packed_layer_stays_the_layer_that_it_was():
    layer = prepare(nn.Linear(16, 8), {"weight": None})
    packed = convert(layer)
    assert isinstance(packed, nn.Linear)
    assert (packed.in_features, packed.out_features) == (16, 8)
    assert "16, " in repr(packed)


def test_whatever_is_put_on_a_packed_layer_takes_part():
    x = torch.randn(3, 16)
    packed = convert(prepare(nn.Linear(16, 8), {"weight": None}))
    expected = F.linear(x, 2 * packed.weight, packed.bias)
    parametrize.register_parametrization(packed, "weight", Double(), unsafe=True)
    torch.testing.assert_close(packed(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), expected)
    with pytest.raises(PIBiNNError, match="parametrized beyond"):
        packed.adjoint(torch.randn(3, 8))


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("structure", [None, BlockDiagonal(4), Banded(1, 2)])
def test_integer_inputs_are_refused_and_not_taken_for_zero(structure):
    packed = convert(prepare(nn.Linear(16, 8), {"weight": structure}))
    for call in (packed, lambda x: packed.adjoint(x[:, :8])):
        with pytest.raises(PIBiNNError, match=r"torch\.int64.*floating-point"):
            call(torch.ones(3, 16, dtype=torch.int64))


def test_autocast_gives_what_it_gives_of_a_float_layer():
    layer = prepare(nn.Linear(16, 8), {"weight": None})
    packed, x = convert(layer), torch.randn(3, 16)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == layer(x).dtype == torch.bfloat16
            torch.testing.assert_close(packed(x), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_packed_layer_follows_its_module_to_another_dtype(dtype):
    packed = convert(prepare(nn.Sequential(nn.Linear(16, 8), nn.Conv1d(8, 4, 1)), {"*.weight": None}))
    packed.to(dtype)
    assert {module.weight.dtype for module in packed} == {dtype}
    assert (
        packed[0](torch.randn(3, 16, dtype=dtype)).dtype == packed[1](torch.randn(2, 8, 5, dtype=dtype)).dtype == dtype
    )
