"""The local bound against Rademacher averages and failures that are enumerated or simulated."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.analysis.kl_bound import code_bound
from lightning_modules.analysis.local_bound import SubRoot, local_bound, local_complexity
from lightning_modules.analysis.unrolled import Unrolled

LOG_SIZES = st.floats(0, 1e7)
COUNTS = st.integers(1, 10**9)


def losses_of_all_sign_patterns(points=4):
    """Losses of the 2^10 one-bit solvers of one block 2 × 5, two tied layers, on a few examples: (1024, points)."""
    generator = torch.Generator().manual_seed(0)
    operator = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(points, 1, 5, generator=generator, dtype=torch.float64)
    x = x * (torch.rand(x.shape, generator=generator) < 0.4)
    y = (operator[0] @ x.mT).mT
    losses = []
    for signs in itertools.product((-1.0, 1.0), repeat=10):
        weight = 0.3 * torch.tensor(signs).reshape(1, 5, 2)
        estimate = Unrolled(operator, weight, torch.ones(2), torch.tensor([0.1, 0.05])).run(y)[-1]
        losses.append((estimate - x).square().sum((-2, -1)) / 4)
    return torch.stack(losses).clamp(max=1).numpy()


@pytest.fixture(scope="module")
def losses():
    return losses_of_all_sign_patterns()


PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.1])
LOG_SIZE = math.log(1024)


def samples(examples):
    """Every sample, in order, of so many examples of four points, with its probability."""
    for sample in itertools.product(range(4), repeat=examples):
        yield np.array(sample), PROBABILITIES[list(sample)].prod()


def rademacher(losses, sample, weights=1.0):
    """The empirical Rademacher average, exactly: all signs, all functions."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(sample))))
    sums = weights * (losses[:, sample] @ signs.T) / len(sample)
    return sums.max(0).mean()


@pytest.mark.parametrize("examples", [1, 4])
def test_psi_bounds_the_local_rademacher_average(losses, examples):
    psi, squares = local_complexity(LOG_SIZE, examples), losses**2 @ PROBABILITIES
    for r in (0.01, 0.1, 0.3, 1.0):
        # The largest multiple of each function in the star hull with P f² <= r, and the zero function.
        shrink = np.minimum(1, np.sqrt(r / squares))[:, None]
        with_zero = np.vstack([losses, np.zeros(4)])
        shrink = np.vstack([shrink, [[1.0]]])
        average = sum(p * rademacher(with_zero, sample, shrink) for sample, p in samples(examples))
        assert 0 < average <= psi(r)


def failures(losses, examples, draws, bound):
    """The fraction of samples for which some function is above its bound."""
    counts = np.random.default_rng(1).multinomial(examples, PROBABILITIES, size=draws)
    true, empirical = losses @ PROBABILITIES, counts @ losses.T / examples
    return (true > bound(empirical)).any(1).mean()


def test_the_bound_fails_no_more_often_than_it_says(losses):
    examples = 3000
    table = np.array([local_bound(LOG_SIZE, examples, p, 0.3) for p in np.linspace(0, 1, 101)])
    assert table[5] < 1  # it says something
    rounded = lambda empirical: table[np.floor(empirical * 100).astype(int).clip(0, 100)]  # noqa: E731  # a lower one
    assert failures(losses, examples, 2000, rounded) <= 0.3
    assert failures(losses, examples, 200, lambda empirical: empirical) > 0.5  # without a bound there are failures


@given(LOG_SIZES, COUNTS, st.floats(0, 1), st.floats(1e-4, 0.5))
def test_it_is_nowhere_below_the_bound_by_codes(log_size, examples, empirical, failure):
    by_code = code_bound(torch.tensor([empirical], dtype=torch.float64), log_size / math.log(2), examples, failure)
    assert local_bound(log_size, examples, empirical, failure) >= by_code - 1e-9


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e6), st.floats(0, 1e6))
def test_sub_root(slope, offset, first, second):
    psi = SubRoot(slope, offset)
    low, high = sorted((first, second))
    assert 0 <= psi(low) <= psi(high)
    if low > 1e-9:
        assert psi(low) / math.sqrt(low) >= psi(high) / math.sqrt(high) * (1 - 1e-12)
    assert psi(psi.fixed_point) == pytest.approx(psi.fixed_point)


@given(LOG_SIZES, COUNTS)
def test_the_fixed_point_solves_its_equation_and_is_the_only_one(log_size, examples):
    psi = local_complexity(log_size, examples)
    r = psi.fixed_point
    assert r > 0
    assert psi(r) == pytest.approx(r)
    assert psi(1.01 * r) < 1.01 * r
    assert psi(0.99 * r) > 0.99 * r


@given(LOG_SIZES, COUNTS, st.floats(0, 1))
def test_the_bound_grows_with_the_class_and_shrinks_with_the_examples(log_size, examples, empirical):
    first = local_bound(log_size, examples, empirical, 0.05)
    assert empirical < first < local_bound(2 * log_size + 1, examples, empirical, 0.05)
    assert local_bound(log_size, 2 * examples, empirical, 0.05) < first


def test_constants_are_those_of_the_theorem():
    """From the definition, by hand, for one function, no empirical error, and the K that is best."""
    n, x = 1000, math.log(1 / 0.05) + math.log(16)
    psi = local_complexity(0.0, n)
    assert psi.slope == pytest.approx(math.sqrt(2 * math.log(2) / n))
    assert psi.offset == pytest.approx(math.log(2) / (3 * n))
    expected = 7.04 * 2 * psi.fixed_point + x * (21 + 6.4 * 2) / n
    assert local_bound(0.0, n, 0.0, 0.05) == pytest.approx(expected)
    # K is chosen: with much empirical error it is a large one.
    assert local_bound(0.0, 10**9, 0.5, 0.05) < 0.51
