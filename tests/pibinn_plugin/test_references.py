"""What a copy of a model cannot follow: functions that hold its layers, and what cannot be copied, are named."""

import copy

import pytest
from foreign_networks import PlainList
from torch import nn

import pibinn_plugin as pb

MATRICES = {"*weight": None}


def test_what_a_copy_cannot_follow_is_named():
    model = pb.prepare(PlainList(), MATRICES)
    model.shortcut = lambda x: model.a(x)
    with pytest.raises(pb.PIBiNNError, match=r"PlainList\.shortcut is a function that holds .* of this model"):
        pb.convert(model)
    model.shortcut = copy.deepcopy(model).a.forward  # of another model: its own business
    pb.convert(model)


GLOBAL_LAYER = nn.Linear(8, 8)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_function_that_holds_a_layer_as_a_default_is_seen_too(by_keyword):
    """The usual way round Python's late binding in loops."""
    model = PlainList()
    if by_keyword:
        model.shortcut = lambda x, *, layer=model.a: layer(x)
    else:
        model.shortcut = lambda x, layer=model.a: layer(x)
    pb.prepare(model, MATRICES)
    with pytest.raises(pb.PIBiNNError, match=r"PlainList\.shortcut.* is a function that holds 'a' of this model"):
        pb.convert(model)


def test_a_function_that_reads_a_global_is_seen_too():
    model = nn.ModuleDict({"layer": GLOBAL_LAYER})
    model.shortcut = lambda x: GLOBAL_LAYER(x)
    pb.prepare(model, MATRICES)
    with pytest.raises(pb.PIBiNNError, match="holds 'layer' of this model"):
        pb.convert(model)


def test_what_cannot_be_copied_is_named():
    model = pb.prepare(PlainList(), MATRICES)
    model.stream = (number for number in range(3))
    with pytest.raises(pb.PIBiNNError, match=r"PlainList\.stream.*generator"):
        pb.convert(model)
