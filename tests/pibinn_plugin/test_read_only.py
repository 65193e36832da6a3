"""A one-bit weight is read only, in every scheme: whoever assigns, deletes or parametrizes it is told so."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pibinn_plugin import PIBiNNError, ScaleError, convert, prepare

SCHEMES = ["native", "torchao", "brevitas"]


def prepared(scheme):
    return prepare(nn.Sequential(nn.Linear(4, 4)), {"0.weight": None}, scheme)


def loaded(model):
    """A model after ``load_state_dict``, which alone may bring a latent."""
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


def loaded_with_assign(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


def after_a_failed_load(model):
    with pytest.raises(RuntimeError):
        model.load_state_dict({**model.state_dict(), "0.bias": torch.ones(5)})
    return model


WRITES = {
    "a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(4, 4))),
    "register_parameter": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.ones(4, 4))),
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("before", [lambda model: model, loaded, loaded_with_assign, after_a_failed_load])
@pytest.mark.parametrize("name", WRITES)
def test_a_weight_cannot_be_written_to(name, before, scheme):
    if (name, scheme) == ("weight norm", "native"):
        pytest.skip("torch puts it on top of the one-bit weight, which stays")
    model = before(prepared(scheme))
    weight = model[0].weight.clone()
    with pytest.raises(PIBiNNError, match="is one-bit"):
        WRITES[name](model[0])
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(convert(model)[0].weight, weight)


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("before", [lambda model: model, loaded])
def test_a_weight_cannot_be_deleted(before, scheme):
    model = before(prepared(scheme))
    weight = model[0].weight.clone()
    with pytest.raises(PIBiNNError, match="is one-bit"):
        del model[0].weight
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("scale", [0.5, torch.ones(1), nn.Parameter(torch.ones(1)), "0.5"])
def test_a_scale_to_share_is_a_global_scale(scale):
    from pibinn_plugin.schemes.torchao import PIBiNNQATConfig, PIBiNNWeightOnlyConfig

    for config in (PIBiNNQATConfig, PIBiNNWeightOnlyConfig):
        with pytest.raises(ScaleError, match="expected a GlobalScale"):
            config(scale=scale)
