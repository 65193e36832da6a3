"""The phase transition of the box relaxation: against its minimisation by scipy, and the relaxation itself."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import lsq_linear, minimize_scalar
from scipy.stats import norm

from lightning_modules.analysis.phase_transition import measure_signs, sign_accuracy
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.operators import SignBlocks
from pibinn_plugin.structure import BlockDiagonal


def accuracy_by_minimisation(ratio, noise):
    """Theorem 2.1 of arXiv 1510.01413 as it is printed."""

    def objective(tau):
        tail, _ = quad(lambda h: (h - 2 / tau) ** 2 * norm.pdf(h), 2 / tau, np.inf)
        return tau / 2 * (ratio - 0.5) + noise / (2 * tau) + tau / 2 * tail

    found = minimize_scalar(lambda log_tau: objective(math.exp(log_tau)), bounds=(-4, 6), method="bounded")
    return norm.cdf(math.exp(-found.x))


@pytest.mark.parametrize("noise", [0.01, 0.1])
@pytest.mark.parametrize("pairs", [16, 20, 30, 40, 64])
def test_the_formula_is_the_minimum_of_the_source(pairs, noise):
    assert sign_accuracy(pairs, 64, noise) == pytest.approx(accuracy_by_minimisation(pairs / 64, noise), abs=2e-4)


@pytest.mark.parametrize(("ratio", "noise"), [(0.4, 0.05), (0.7, 0.3), (1.2, 0.5)])
def test_the_formula_against_the_relaxation_of_large_random_problems(ratio, noise):
    random, unknowns = np.random.default_rng(0), 400
    pairs, right = round(ratio * unknowns), []
    for _ in range(4):
        signs = random.choice([-1.0, 1.0], unknowns)
        inputs = random.standard_normal((pairs, unknowns)) / math.sqrt(unknowns)
        outputs = inputs @ signs + math.sqrt(noise) * random.standard_normal(pairs)
        right.append((np.sign(lsq_linear(inputs, outputs, (-1, 1)).x) == signs).mean())
    assert np.mean(right) == pytest.approx(sign_accuracy(pairs, unknowns, noise), abs=0.025)


def test_the_curve_of_the_calibration_task():
    """Predicted .7206 and .8395 at 20 and 30 pairs; near the transition, at 40, the prediction is optimistic."""
    data = SparseRecovery(SignBlocks(8, 32, 64, seed=1), snr_db=20.0)
    curve = measure_signs(data, BlockDiagonal(8), (256, 512), counts=[20, 30, 40])
    assert curve.box[:2] == pytest.approx((0.7206, 0.8395), abs=0.01)
    assert 0.92 < curve.box[2] < 0.96 < 0.9998 == pytest.approx(sign_accuracy(40, 64, 0.01), abs=1e-4)
    assert all(start > box for start, box in zip(curve.start, curve.box, strict=True))
    assert max(map(len, str(curve).splitlines())) <= 120


def test_measured_signs_are_those_of_the_operator():
    data = SparseRecovery(SignBlocks(2, 8, 16), snr_db=60.0)
    curve = measure_signs(data, BlockDiagonal(2), (16, 32), counts=[1, 300])
    assert curve.start[1] == curve.box[1] == curve.all_right[1] == 1
    assert curve.start[0] < 0.8
    assert curve.unknowns == 16
