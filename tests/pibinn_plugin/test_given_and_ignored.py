"""Whatever a user gives is used, or refused: plausible mistakes that would end in a plausible, wrong network."""

import copy
import warnings

import brevitas.nn as qnn
import pytest
import torch
from torch import nn

from pibinn_plugin import (
    Banded,
    BlockDiagonal,
    Dense,
    Mask,
    PIBiNNError,
    SignsFromOperator,
    SignsFromPairs,
    StructureError,
    TargetError,
    convert,
    prepare,
)
from pibinn_plugin.initialization.sign_regression import PairStatistics
from pibinn_plugin.initialization.start import signs_from_operator
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.schemes.brevitas import PIBiNNWeightQuant


def normed():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))


@pytest.mark.parametrize("structure", [None, Dense()])
@pytest.mark.parametrize("pattern", ["*", "*.weight", "*.bias"])
def test_a_pattern_takes_in_no_vectors_whatever_its_structure(structure, pattern):
    model = normed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=r"gains of normalizations.*narrow the pattern"):
        prepare(model, {pattern: structure})
    assert model.state_dict().keys() == before.keys()
    prepare(model, {"0.weight": structure, "1.weight": structure})  # by its name a vector can be a target


@pytest.mark.parametrize("pattern", [None, 0, ("0.weight",), b"0.weight"])
def test_a_pattern_is_text(pattern):
    with pytest.raises(TargetError, match="no parameter-name pattern"):
        prepare(normed(), {pattern: None})


def test_one_tensor_is_no_list_of_inputs():
    """Its rows would be taken for inputs: with one row, the network would be compared on a vector."""
    model = prepare(nn.Linear(4, 4), {"weight": None})
    convert(model, args=(torch.ones(1, 4),))
    with pytest.raises(PIBiNNError, match="expected a tuple"):
        convert(model, args=torch.ones(1, 4))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1j])
def test_a_mask_of_what_is_added_to_attention_is_refused(value):
    """There -inf is where nothing may be: as a mask it would mean the opposite."""
    pattern = torch.zeros(2, 2, dtype=torch.complex64 if isinstance(value, complex) else torch.float32)
    pattern[0, 1] = value
    with pytest.raises(StructureError, match="expected True or 1"):
        Mask(pattern)


@pytest.mark.parametrize("name", ["maks", "structure", "bit_width", "scaling_init"])
def test_an_argument_that_brevitas_would_drop_is_refused(name):
    scale = GlobalScale(0.1)
    structure = BlockDiagonal(4)
    layer = qnn.QuantLinear(16, 8, weight_quant=PIBiNNWeightQuant, weight_scaling_impl=scale, weight_mask=structure)
    assert layer.weight.count_nonzero() == structure.nnz((8, 16))
    arguments = {f"weight_{name}": structure}
    with pytest.raises(PIBiNNError, match=f"knows no {name}; expected scaling_impl and mask"):
        qnn.QuantLinear(16, 8, weight_quant=PIBiNNWeightQuant, weight_scaling_impl=GlobalScale(0.1), **arguments)
    with pytest.raises(PIBiNNError, match=f"knows no {name}"):
        qnn.QuantLinear(16, 8, weight_quant=PIBiNNWeightQuant.let(scaling_impl=GlobalScale(0.1), **{name: 1}))


def test_what_an_operator_has_outside_of_the_structure_is_said():
    operator = torch.diag(torch.ones(6)) + torch.diag(torch.ones(5), 1)
    with pytest.warns(UserWarning, match=r"45\.45% of the energy of the operator.*Banded\(lower=0, upper=0\)"):
        signs_from_operator(operator, Banded(0, 0), (6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        signs_from_operator(operator, Banded(0, 1), (6, 6))
        signs_from_operator(operator + 1e-6 * torch.rand(6, 6), Banded(0, 1), (6, 6))  # as of an FFT


def test_a_complex_operator_has_no_signs():
    model = prepare(nn.Linear(4, 4), {"weight": None})
    with pytest.raises(StructureError, match="complex64, and weights are real"):
        SignsFromOperator(torch.eye(4) * 1j)(model)


@pytest.mark.parametrize("which", [0, 1])
def test_complex_pairs_are_refused(which):
    pairs = [torch.ones(3, 4), torch.ones(3, 4)]
    pairs[which] = pairs[which] * 1j
    with pytest.raises(PIBiNNError, match="or complex ones"):
        PairStatistics(Dense(), (4, 4)).add(*pairs)


WRONG_SIZES = [
    Dense(),
    Banded(1, 1),
    BlockDiagonal(2),
    BlockDiagonal(rows=(1, 3), columns=(3, 1)),
    BlockDiagonal(2, row_order=(1, 0, 3, 2), column_order=(0, 2, 1, 3)),
    Mask(torch.eye(4)),
]


@pytest.mark.parametrize("structure", WRONG_SIZES)
@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("gradient", [True, False])
def test_features_that_no_weight_stands_for_are_refused(structure, size, gradient):
    """A band would leave the last ones out, and an order read the first four."""
    layer = CompactLinear(4, 4, structure)
    with torch.set_grad_enabled(gradient):
        with pytest.raises((StructureError, RuntimeError), match=f"4.*{size}|{size}.*4"):
            layer(torch.ones(2, size))
        packed = convert(prepare(layer, {"weight": None}))
        with pytest.raises((StructureError, RuntimeError)):
            packed(torch.ones(2, size))
        assert packed(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("sizes", [{1, 2}, {1: 3, 2: 4}, frozenset({1})])
def test_sizes_of_blocks_have_an_order(sizes):
    with pytest.raises(StructureError, match="expected a list of whole numbers"):
        BlockDiagonal(rows=sizes, columns=[1] * len(sizes))


@pytest.mark.parametrize("targets", [["weight"], "weight", ("weight", None)])
def test_targets_are_a_dict(targets):
    with pytest.raises(TargetError, match="expected a dict"):
        prepare(nn.Linear(4, 4), targets)


@pytest.mark.parametrize("place", [0, "x"])
def test_inputs_and_outputs_of_pairs_are_two(place):
    with pytest.raises(PIBiNNError, match="would be the identity"):
        SignsFromPairs(inputs=place, outputs=place)


def test_a_mask_of_a_matrix_with_rounding_says_so():
    """As the circular blur that an FFT multiplies with: 192 nonzeros, and rounding everywhere else."""
    kernel = torch.fft.rfft(torch.tensor([0.5, 0.25, *[0.0] * 61, 0.25]))
    matrix = torch.fft.irfft(torch.fft.rfft(torch.eye(64)) * kernel, n=64)
    with pytest.warns(UserWarning, match=rf"{matrix.count_nonzero() - 192} of the nonzeros .* structure_from_operator"):
        mask = Mask(matrix)
    assert mask.nnz((64, 64)) > 192
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pattern in (torch.eye(4), torch.tensor([[1e-5, 1.0]]), matrix.abs() > 0.1, torch.tensor([[1, 10**9]])):
            Mask(pattern)


@pytest.mark.parametrize("scheme", ["torchao", "brevitas"])
@pytest.mark.parametrize("name", ["0.bias", "1.weight"])
def test_a_scheme_of_weights_of_layers_refuses_every_other_parameter(name, scheme):
    """It would quantize the weight in the place of the bias."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=r"use scheme=\"native\" for anything else"):
        prepare(model, {name: None}, scheme)
    assert model.state_dict().keys() == before.keys()
    assert prepare(model, {name: None}, "native").get_submodule(name[0]) is model[int(name[0])]
