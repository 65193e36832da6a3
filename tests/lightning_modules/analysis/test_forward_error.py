"""The error of calibrated rows: the figures of 300 pairs, and losses by hand."""

import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.analysis.forward_error import FAILURE, forward_error, row_bounds
from lightning_modules.analysis.kl_bound import code_bound
from lightning_modules.analysis.network import network_scale, one_bit_weights
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.calibrated_amp import CalibratedAMP
from pibinn_plugin.initialization import SignsFromPairs


def test_rows_of_64_signs_from_300_pairs():
    """256 rows of 64 signs and λ, measured .0099."""
    bounds = row_bounds(torch.full((256,), 0.0099), torch.full((256,), 64), pairs=300)
    assert bounds == pytest.approx({"one-bit": 0.256, "ternary": 0.319, "float": 0.992}, abs=5e-4)


def test_losses_and_bounds_by_hand():
    operator = SignBlocks(2, 4, 8)
    data = SparseRecovery(operator, sparsity=0.3, snr_db=20.0, training_pairs=150, train_examples=150)
    data.setup()
    model = pb.prepare(CalibratedAMP(8, 16, pb.BlockDiagonal(2), layers=2), {"operator.weight": None})
    start = SignsFromPairs()
    y, x = data.fixed_pairs()
    start(model, [(y, x)])
    [weight] = one_bit_weights(model)
    found = forward_error(weight, network_scale(model), start, data)
    matrix = weight.structure.to_dense(network_scale(model) * weight.signs, weight.shape)
    power = float(f"{data.val_set.tensors[0].square().mean():.1e}")
    losses = ((y - x @ matrix.T).square() / power).clamp(max=1).double()
    assert found.measured == pytest.approx(losses.mean().item(), rel=1e-4)
    assert found.bounds["one-bit"] == pytest.approx(code_bound(losses.mean(0), 8 + 32, 150, FAILURE), rel=1e-4)
    assert found.row_bits == pytest.approx({"one-bit": 40, "ternary": 44.68, "float": 256}, abs=0.01)
    assert (found.pairs, found.rows) == (150, 8)
    assert found.held_out < found.bounds["one-bit"]
    assert max(map(len, str(found).splitlines())) <= 120
