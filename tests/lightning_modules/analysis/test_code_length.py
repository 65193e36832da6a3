"""Code lengths: the sums over all codewords, and networks counted by hand."""

import itertools
import math

import pytest
import torch
from torch import nn

import pibinn_plugin as pb
from lightning_modules.analysis.code_length import code_lengths, flip_bits
from lightning_modules.analysis.network import float_parameters, network_scale, one_bit_weights
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.calibrated_amp import CalibratedAMP
from lightning_modules.solvers.coupled_ista import CoupledISTA


@pytest.mark.parametrize("count", [1, 7, 12])
def test_the_code_of_flips_is_a_prefix_code(count):
    """Kraft: the sum over all patterns is one, so that there is such a code and no bit is wasted."""
    flips = torch.tensor([sum(signs) for signs in itertools.product((0, 1), repeat=count)])
    assert float((0.5 ** flip_bits(count, flips)).sum()) == pytest.approx(1)
    assert flip_bits(count, torch.tensor(1)).item() == pytest.approx(math.log2(count) + math.log2(count + 1))


def solver(layers=3, blocks=2):
    return pb.prepare(CoupledISTA(SignBlocks(blocks, 4, 6), layers), {"layers.*.weight": None})


def test_a_network_counted_by_hand():
    model = solver()
    bits = code_lengths(one_bit_weights(model), float_parameters(model), blocks=2).bits()
    floats = 3 + 3 + 1  # step sizes, thresholds, λ
    signs, rows = 3 * 4 * 6, 3 * 6
    assert float_parameters(model) == floats
    expected = {
        "one-bit": signs + 32 * floats,
        "ternary": signs * math.log2(3) + 32 * floats,
        "channel-wise": signs + 32 * rows + 32 * (floats - 1),
        "float": 32 * signs + 32 * (floats - 1),
    }
    assert {scheme: float(length) for scheme, length in bits.items()} == pytest.approx(expected)


def test_flips_are_counted_block_by_block():
    model, prior = solver(), solver()
    with torch.no_grad():
        latent = model.layers[1].parametrizations.weight.original
        latent[1, 2, 3] *= -1
        latent[1, 0, 0] *= -1
    lengths = code_lengths(one_bit_weights(model), 7, one_bit_weights(prior), blocks=2)
    assert lengths.flipped.tolist() == [0, 2]
    torch.testing.assert_close(lengths.bits()["one-bit, flips"], flip_bits(72, torch.tensor([0, 2])) + 224)


def test_a_weight_of_many_layers_is_told_once():
    one, many = (
        pb.prepare(CalibratedAMP(8, 16, pb.BlockDiagonal(2), layers), {"operator.weight": None}) for layers in (1, 9)
    )
    assert code_lengths(one_bit_weights(one), 1).nonzeros == code_lengths(one_bit_weights(many), 1).nonzeros == 64


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
def test_weights_are_read_in_every_scheme_and_packed(scheme):
    model = pb.prepare(nn.Sequential(nn.Linear(8, 4)), {"0.weight": pb.BlockDiagonal(2)}, scheme)
    [trained], [packed] = one_bit_weights(model), one_bit_weights(pb.convert(model))
    assert torch.equal(trained.signs, packed.signs)
    assert trained.row_nonzeros.tolist() == packed.row_nonzeros.tolist() == [4] * 4
    assert network_scale(model) == pytest.approx(trained.latent.abs().mean().item())
    assert float_parameters(model) == 5


def test_what_does_not_fit_is_refused():
    weights = one_bit_weights(solver())
    with pytest.raises(ValueError, match=r"layers\.0\.weight.*expected weights of 3 blocks"):
        code_lengths(weights, 1, blocks=3)
    with pytest.raises(ValueError, match="the prior: expected"):
        code_lengths(weights, 1, weights[:2])
