"""The thresholds against the minimisation problems that define them."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.solvers.proximal import firm_threshold, soft_threshold

VALUES = st.lists(st.floats(-10, 10), min_size=1)


@given(VALUES, st.floats(0, 5))
def test_soft_threshold_solves_its_proximal_problem(values, threshold):
    x = torch.tensor(values, dtype=torch.float64)
    solution = soft_threshold(x, torch.tensor(threshold, dtype=torch.float64))
    expected = np.sign(values) * np.maximum(np.abs(values) - threshold, 0)
    np.testing.assert_allclose(solution.numpy(), expected, atol=1e-12)


@given(VALUES, st.floats(0, 5), st.floats(0.01, 20))
def test_firm_threshold_is_zero_then_linear_then_the_identity(values, threshold, width):
    x = torch.tensor(values, dtype=torch.float64)
    found = firm_threshold(x, *(torch.tensor(value, dtype=torch.float64) for value in (threshold, width)))
    expected = np.interp(
        np.abs(values), [0, threshold, threshold * (1 + width), 1e3], [0, 0, threshold * (1 + width), 1e3]
    )
    if threshold == 0:
        expected = np.abs(values)
    np.testing.assert_allclose(found.numpy(), np.sign(values) * expected, atol=1e-9)


@given(st.floats(-4, 4), st.floats(0.1, 2), st.floats(0.1, 3))
def test_firm_threshold_solves_its_proximal_problem(value, threshold, width):
    """Of the minimax concave penalty t |z| - z² / 2γ, flat from γ t on, with γ = 1 + w."""
    gamma = 1 + width
    z = np.linspace(-5, 5, 20_001)
    penalty = np.where(
        np.abs(z) < gamma * threshold, threshold * np.abs(z) - z**2 / (2 * gamma), gamma * threshold**2 / 2
    )
    best = z[np.argmin((z - value) ** 2 / 2 + penalty)]
    arguments = (torch.tensor(each, dtype=torch.float64) for each in (value, threshold, width))
    assert abs(firm_threshold(*arguments).item() - best) < 5e-3


def test_derivatives_are_finite_where_nothing_passes():
    x = torch.tensor([0.0, 1e-30, -0.1, 5.0], requires_grad=True)
    threshold = torch.tensor(0.3, requires_grad=True)
    width = torch.tensor(0.5, requires_grad=True)
    firm_threshold(x, threshold, width).sum().backward()
    for each in (x, threshold, width):
        assert each.grad.isfinite().all()
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 1.0]
