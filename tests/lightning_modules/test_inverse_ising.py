"""Couplings from samples: against a general optimizer, recovery, the order of precisions, errors."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from lightning_modules.data.spin_samples import SpinSamples
from lightning_modules.inverse_ising import (
    box_couplings,
    fit_couplings,
    fit_scale,
    one_bit_couplings,
    ridge_couplings,
    ternary_couplings,
)
from lightning_modules.metrics import nmse_db
from lightning_modules.pseudo_likelihood import negative_log_pseudo_likelihood
from lightning_modules.solvers.local_fields import local_fields
from pibinn_plugin import PIBiNNError
from pibinn_plugin.errors import ScaleError


def draw(samples, size=4, coupling=0.6, seed=0):
    data = SpinSamples(size, coupling, samples, 1, sweeps=50, seed=seed)
    data.setup("fit")
    return data.train_set.samples, data.couplings


def objective(spins, penalty):
    def value_and_gradient(flat):
        couplings = torch.tensor(flat).reshape(2, *spins.shape[1:]).requires_grad_()
        fields = local_fields(spins.double(), couplings)
        value = negative_log_pseudo_likelihood(fields, spins.double()).sum() + penalty * couplings.square().sum()
        value.backward()
        return value.item(), couplings.grad.flatten().numpy()

    return value_and_gradient


@pytest.mark.parametrize(("box", "penalty"), [(0.3, 0.0), (0.8, 0.0), (float("inf"), 2.0), (0.5, 1.0)])
def test_the_minimum_is_that_of_a_general_optimizer(box, penalty):
    spins, _ = draw(30)
    bounds = [(-box, box)] * 32
    reference = minimize(objective(spins, penalty), np.zeros(32), jac=True, bounds=bounds, method="L-BFGS-B").x
    found = fit_couplings(spins, box, penalty)
    np.testing.assert_allclose(found.flatten().numpy(), reference, atol=3e-3)
    assert found.abs().max() <= box


@pytest.mark.parametrize("zeros", [False, True])
def test_the_scale_is_that_of_a_line_search(zeros):
    spins, couplings = draw(30)
    codes = couplings.sign()
    if zeros:
        codes[0, :2] = 0

    def loss(scale):
        return negative_log_pseudo_likelihood(local_fields(spins, scale * codes).double(), spins.double()).sum().item()

    assert fit_scale(spins, codes) == pytest.approx(minimize_scalar(loss, bounds=(0, 5), method="bounded").x, abs=1e-3)


def test_signs_are_found_where_float_couplings_are_far_off():
    spins, couplings = draw(80, size=8)
    start = one_bit_couplings(spins)
    assert torch.equal(start.latent.sign(), couplings.sign())
    assert start.latent.abs().min() >= 0.2 * start.scale * (1 - 1e-6)
    one_bit, box, ridge = (
        nmse_db(each, couplings) for each in (start.weight, box_couplings(spins), ridge_couplings(spins))
    )
    assert one_bit < -20 < box
    assert -18 < box < -8
    assert ridge < -6


def test_ternary_couplings_have_three_values_and_are_zero_where_samples_leave_them_open():
    spins, _ = draw(12, size=8, coupling=0.3)
    found = ternary_couplings(spins)
    assert len(found.abs().unique()) <= 2
    sure = fit_couplings(spins, box=0.3).abs()
    if (found == 0).any():
        assert sure[found == 0].mean() < sure[found != 0].mean()


@pytest.mark.parametrize("solve", [ridge_couplings, box_couplings, one_bit_couplings, ternary_couplings])
def test_too_few_samples_and_other_values_are_refused(solve):
    with pytest.raises(PIBiNNError, match="3 samples cannot be dealt into 4 parts"):
        solve(torch.ones(3, 4, 4))
    with pytest.raises(PIBiNNError, match="values of -1 and 1 alone"):
        solve(torch.zeros(8, 4, 4))


def test_codes_that_the_samples_contradict_have_no_scale():
    with pytest.raises(ScaleError, match="10 samples does not rise"):
        fit_scale(torch.ones(10, 4, 4), -torch.ones(2, 4, 4))
    with pytest.raises(ScaleError, match="does not rise"):
        fit_scale(torch.ones(10, 4, 4), torch.zeros(2, 4, 4))
