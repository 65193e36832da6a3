"""Layers that torchao's ``quantize_`` meets again: left as they are, or refused with the structure that they have."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from pibinn_plugin import Banded, BlockDiagonal, Dense, PIBiNNError, StructureError, global_scale
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.schemes.torchao import PIBiNNQATConfig, PIBiNNTensor, PIBiNNWeightOnlyConfig


def prepared(structure=None):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_(model, PIBiNNQATConfig(structure))
    return model


@pytest.mark.parametrize("again", [None, BlockDiagonal(2)])
def test_preparing_twice_changes_nothing(again):
    model = prepared(BlockDiagonal(2))
    quantizers = [layer.weight_fake_quantizer for layer in model]
    state = copy.deepcopy(model.state_dict())
    quantize_(model, PIBiNNQATConfig(again))
    assert [layer.weight_fake_quantizer for layer in model] == quantizers
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sum(parameter is global_scale(model).value for parameter in model.parameters()) == 1


@pytest.mark.parametrize("again", [Dense(), Banded(1, 1), BlockDiagonal(4)])
def test_preparing_again_with_another_structure_is_refused(again):
    model = prepared(BlockDiagonal(2))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(StructureError, match=r"is prepared with BlockDiagonal\(blocks=2"):
        quantize_(model, PIBiNNQATConfig(again))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_packing_twice_changes_nothing():
    model = prepared(BlockDiagonal(2))
    quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    weights = [layer.weight for layer in model]
    assert all(isinstance(weight, PIBiNNTensor) for weight in weights)
    quantize_(model, PIBiNNWeightOnlyConfig(Banded(0, 0)))
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))


@pytest.mark.parametrize("layer", [lambda: prepared()[0], lambda: CompactLinear(8, 8, BlockDiagonal(2))])
def test_packing_what_is_in_training_or_compact_is_refused(layer):
    with pytest.raises(PIBiNNError, match=r"is packed by pb\.convert"):
        quantize_(nn.Sequential(layer()), PIBiNNWeightOnlyConfig(), filter_fn=lambda module, name: name == "0")


def test_a_scale_whose_parameter_is_negative_is_packed_as_it_is_read():
    """An optimizer may step over 0; λ is the magnitude, and packed tensors share the parameter's memory."""
    model = prepared()
    with torch.no_grad():
        global_scale(model).value.fill_(-0.375)
    weights = [layer.weight.detach().clone() for layer in model]
    quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    for layer, weight in zip(model, weights, strict=True):
        assert torch.equal(layer.weight.dequantize(), weight)
        assert weight.abs().unique().tolist() == [0.375]
