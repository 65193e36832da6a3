"""ISTA and FISTA: descent, the rate of the theorem, the optimality conditions of the lasso, and a textbook in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.operators import DenseOperator, SubsampledDCT, spectral_norm
from lightning_modules.solvers.ista import FISTA, ISTA


def problem(seed, rows=10, columns=20):
    """A random operator in float64 and a few sparse signals measured with it, noise added."""
    generator = torch.Generator().manual_seed(seed)
    operator = DenseOperator(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    x = torch.randn(3, columns, generator=generator, dtype=torch.float64)
    x = x * (torch.rand(3, columns, generator=generator) < 0.2)
    noise = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    return operator, operator.A(x) + 0.05 * noise


def penalty(operator, y, regularization):
    return regularization * operator.A_adjoint(y).abs().amax(-1)


def objective(operator, x, y, weight):
    return 0.5 * (y - operator.A(x)).square().sum(-1) + weight * x.abs().sum(-1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.01, 1))
def test_ista_never_increases_the_objective(seed, regularization):
    operator, y = problem(seed)
    weight = penalty(operator, y, regularization)
    before = objective(operator, torch.zeros(3, 20, dtype=torch.float64), y, weight)
    for iterations in (1, 2, 3, 5, 8, 13, 40):
        after = objective(operator, ISTA(operator, iterations, regularization)(y), y, weight)
        assert (after <= before + 1e-12).all()
        before = after


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.floats(0.05, 1))
def test_fista_keeps_the_bound_of_its_theorem(seed, regularization):
    operator, y = problem(seed)
    weight, lipschitz = penalty(operator, y, regularization), spectral_norm(operator) ** 2
    solution = FISTA(operator, 1500, regularization)(y)
    # Optimality: the gradient is λ sign(x) on the support and at most λ off it.
    gradient = operator.A_adjoint(y - operator.A(solution))
    assert (gradient.abs() <= weight[:, None] * (1 + 1e-4)).all()
    on_support = (gradient - weight[:, None] * solution.sign()).abs()[solution.abs() > 1e-4]
    assert (on_support <= 1e-3 * weight.max()).all()
    least = objective(operator, solution, y, weight)
    for iterations in (1, 4, 16, 64):
        excess = objective(operator, FISTA(operator, iterations, regularization)(y), y, weight) - least
        assert (excess <= 2 * lipschitz * solution.square().sum(-1) / (iterations + 1) ** 2 + 1e-9).all()


def textbook(a, y, iterations, regularization, momentum):
    """FISTA in numpy for one sample; ISTA without momentum."""
    step, weight = 1 / np.linalg.norm(a, 2) ** 2, regularization * np.abs(a.T @ y).max()
    x = z = np.zeros(a.shape[1])
    t = 1.0
    for _ in range(iterations):
        u = z + step * a.T @ (y - a @ z)
        following, t_following = np.sign(u) * np.maximum(np.abs(u) - step * weight, 0), (1 + np.sqrt(1 + 4 * t**2)) / 2
        z = following + momentum * (t - 1) / t_following * (following - x)
        x, t = following, t_following
    return x


@pytest.mark.parametrize(("solver", "momentum"), [(ISTA, 0), (FISTA, 1)])
def test_both_are_the_textbook(solver, momentum):
    operator, y = problem(3)
    expected = [textbook(operator.blocks[0].numpy(), sample, 7, 0.2, momentum) for sample in y.numpy()]
    np.testing.assert_allclose(solver(operator, 7, 0.2)(y), expected, atol=1e-10)


def test_no_penalty_smaller_than_the_largest_correlation_gives_zero():
    operator, y = problem(4)
    assert ISTA(operator, 30, 1.0)(y).abs().max() < 1e-12
    assert (ISTA(operator, 30, 0.9)(y) != 0).any(-1).all()


def test_an_operator_without_a_matrix_will_do_and_nothing_is_learned():
    solver = FISTA(SubsampledDCT(12, 24), iterations=5)
    assert solver.step_size == pytest.approx(1.0, rel=1e-5)
    assert solver(torch.randn(2, 3, 12)).shape == (2, 3, 24)
    assert list(solver.parameters()) == [] and solver.state_dict() == {}


def test_errors_name_what_was_given():
    operator, y = problem(0)
    for wrong in ({"iterations": 0}, {"regularization": 0.0}, {"regularization": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            ISTA(operator, **wrong)
    with pytest.raises(ValueError, match=r"y has shape \(3, 9\); expected 10"):
        FISTA(operator)(y[:, :9])
