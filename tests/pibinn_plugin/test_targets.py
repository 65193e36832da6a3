"""From patterns to weights, and the errors on the way: each names the parameter, its shape and what would fit."""

import pytest
import torch
from torch import nn

from pibinn_plugin import PIBiNNError, StructureError, TargetError, prepare
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense
from pibinn_plugin.targets import resolve_targets


def network():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)))


def test_patterns_are_those_of_the_shell_over_parameter_names():
    model = network()
    by_pattern = {
        "[02].*weight": ["0.weight", "2.0.weight", "2.1.weight"],
        "2.*.weight": ["2.0.weight", "2.1.weight"],
        "2.[1-9].weight": ["2.1.weight"],
        "[0].weight": ["0.weight"],
    }
    for pattern, names in by_pattern.items():
        assert [target.name for target in resolve_targets(model, {pattern: None})] == names


def test_targets_hold_the_parameter_its_module_shape_and_structure():
    model = network()
    first, last = resolve_targets(model, {"0.weight": BlockDiagonal(2), "2.1.weight": None})
    assert first.parameter is model[0].weight
    assert (first.module, first.shape, first.structure, first.compact) == (model[0], (6, 8), BlockDiagonal(2), False)
    assert last.structure == Dense()
    assert torch.equal(first.structural_latent, BlockDiagonal(2).to_compact(model[0].weight))


def test_compact_layer_brings_its_structure():
    model = nn.Sequential(BlockDiagonalLinear(8, 4, 2))
    for structure in (None, BlockDiagonal(2)):
        (target,) = resolve_targets(model, {"0.weight": structure})
        assert (target.structure, target.shape, target.compact) == (BlockDiagonal(2), (4, 8), True)
        assert target.structural_latent is model[0].weight
    with pytest.raises(StructureError, match=r"0\.weight.*stored as.*blocks=2.*blocks=4"):
        resolve_targets(model, {"0.weight": BlockDiagonal(4)})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)


class Number(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.5))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.steps = [self.layer.weight]


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.transposed = self.layer.weight.t()


class Integers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)


ERRORS = [
    (network, {}, "at least one"),
    (network, {"layers.*.weight": None}, r"layers\.\*\.weight.*matches no parameter.*0\.weight \(6, 8\)"),
    (network, {"0.weights": None}, r"2\.1\.weight \(4, 4\)"),
    (network, {"0.weight": None, "*.weight": None}, r"'0\.weight' is matched by .* another pattern"),
    (network, {"0.weight": BlockDiagonal(5)}, r"'0\.weight' \(shape \(6, 8\), in a Linear\).*divisor"),
    (network, {"0.bias": Banded(0, 0)}, r"'0\.bias' \(shape \(6,\)"),
    (network, {"0.weight": 8}, r"0\.weight.*expected a Structure"),
    (network, {"*.weight": None}, r"'1\.weight' \(shape \(6,\), in a BatchNorm1d\).*one by one"),
    (lambda: nn.Sequential(nn.Embedding(4, 3, padding_idx=0)), {"*": None}, r"padding row"),
    (Number, {"*": None}, r"'gain' is a number"),
    (Listed, {"layer.weight": None}, r"'layer\.weight'.* held by Listed\.steps\[0\]"),
    (Viewed, {"layer.weight": None}, r"'layer\.weight'.* held by Viewed\.transposed"),
    (lambda: nn.LSTM(3, 4), {"weight_hh_l0": None}, r"held by LSTM\._flat_weights\[1\]"),
    (lambda: torch.jit.script(nn.Linear(3, 2)), {"weight": None}, "ScriptModule"),
    (Tied, {"encoder.weight": None, "decoder.weight": None}, r"'encoder\.weight' is matched by .*another pattern"),
    (Integers, {"weight": None}, "int8"),
    (lambda: nn.LazyLinear(4), {"weight": None}, "no shape yet"),
    (nn.ReLU, {"*": None}, "no parameter"),
]


@pytest.mark.parametrize(
    ("make", "pattern", "names"),
    [
        (Tied, "encoder.weight", ["encoder.weight", "decoder.weight"]),
        (Tied, "decoder.weight", ["encoder.weight", "decoder.weight"]),
        (Tied, "*.weight", ["encoder.weight", "decoder.weight"]),
        (Twice, "second.weight", ["first.weight", "second.weight"]),
        (lambda: nn.ModuleDict({"a[0-9]": nn.Linear(4, 4)}), "a[0-9].weight", ["a[0-9].weight"]),
    ],
)
def test_a_weight_under_several_names_is_one_target(make, pattern, names):
    (target,) = resolve_targets(make(), {pattern: None})
    assert [place.name for place in target.places] == names


@pytest.mark.parametrize(("make", "targets", "words"), ERRORS)
def test_errors_name_the_parameter_and_what_would_fit(make, targets, words):
    with pytest.raises((TargetError, StructureError), match=words) as caught:
        resolve_targets(make(), targets)
    assert isinstance(caught.value, PIBiNNError)


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
@pytest.mark.parametrize(("make", "targets", "words"), ERRORS)
def test_refused_targets_leave_the_model_as_it_was(make, targets, words, scheme):
    model = make()
    before = {name: id(module) for name, module in model.named_modules()}
    types = [type(module) for module in model.modules()]
    with pytest.raises(PIBiNNError, match=words):
        prepare(model, targets, scheme)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert [type(module) for module in model.modules()] == types


def test_quantized_and_packed_weights_are_no_targets_again():
    model = prepare(network(), {"0.weight": None})
    with pytest.raises(PIBiNNError, match="prepared already"):
        prepare(model, {"2.0.weight": None})


def test_a_pattern_leaves_no_embedding_with_a_padding_row_to_chance():
    """The row is zero, which no sign is."""
    padded, plain = (nn.Sequential(nn.Embedding(5, 4, padding_idx=row), nn.Linear(4, 4)) for row in (0, None))
    with pytest.raises(TargetError, match="embeddings with a padding row"):
        resolve_targets(padded, {"*.weight": None})
    assert [target.name for target in resolve_targets(padded, {"0.weight": None, "1.weight": None})] == [
        "0.weight", "1.weight"
    ]  # fmt: skip
    assert len(resolve_targets(plain, {"*.weight": None})) == 2


def test_compact_layers_of_other_sizes_share_no_weight():
    """A band of one diagonal has as many nonzeros in 4 × 6 as in 4 × 4."""
    model = nn.Sequential(BandedLinear(6, 4, 0, 0), BandedLinear(4, 4, 0, 0))
    model[1].weight = model[0].weight
    with pytest.raises(TargetError, match="in a layer that reads it by another structure"):
        resolve_targets(model, {"0.weight": None})
