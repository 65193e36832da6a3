"""Bounds from codes against scipy, the exact binomial interval, and failures that are counted."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import beta, binom

from lightning_modules.analysis.kl_bound import (
    binary_kl,
    code_bound,
    confidence_interval,
    examples_for_gap,
    largest_mean,
)
from lightning_modules.analysis.unrolled import Unrolled

FRACTIONS = st.floats(0, 1)


@given(FRACTIONS, FRACTIONS)
def test_kl_is_that_of_scipy(measured, true):
    expected = rel_entr(measured, true) + rel_entr(1 - measured, 1 - true)
    found = binary_kl(*torch.tensor([measured, true], dtype=torch.float64))
    assert found == pytest.approx(max(0, expected), abs=1e-12)


@given(FRACTIONS, st.floats(1e-6, 10))
def test_the_inverse_is_the_largest_mean_within_the_budget(measured, budget):
    bound = largest_mean(torch.tensor(measured, dtype=torch.float64), budget).item()
    assert measured <= bound <= 1
    kl = lambda p: rel_entr(measured, p) + rel_entr(1 - measured, 1 - p)  # noqa: E731
    if bound < 1 - 1e-9:
        assert kl(bound) == pytest.approx(budget, rel=1e-4)
        assert kl(bound + 1e-4 * (1 - bound)) > budget


@given(st.integers(1, 2000), FRACTIONS, st.floats(1e-4, 0.5))
def test_the_bound_of_a_coin_is_above_the_exact_one_and_not_far(count, fraction, failure):
    """Clopper and Pearson's limit is the smallest valid one for coins."""
    heads = round(fraction * count)
    exact = 1.0 if heads == count else beta.ppf(1 - failure, heads + 1, count - heads)
    bound = code_bound(torch.tensor([heads / count]), 0, count, failure)
    assert bound >= exact - 1e-9
    # Chernoff's bound loses a factor of the order √N in the probability: this much, and no more.
    tail = binom.cdf(heads, count, min(bound, 1 - 1e-12))
    assert bound >= 1 - 1e-9 or tail >= failure / (4 * math.sqrt(count))


@pytest.mark.parametrize("failure", [0.05, 0.3])
@pytest.mark.parametrize("shape", [(0.2, 1.8), (2.0, 2.0), (0.05, 0.05)])
def test_losses_between_zero_and_one_fail_no_more_often_than_stated(shape, failure):
    draws = np.random.default_rng(0).beta(*shape, size=(4000, 25))
    bounds = largest_mean(torch.from_numpy(draws.mean(1)), math.log(1 / failure) / 25).numpy()
    failed = (shape[0] / sum(shape) > bounds).mean()
    assert failed <= failure
    low = 1 - largest_mean(1 - torch.from_numpy(draws.mean(1)), math.log(2 / failure) / 25).numpy()
    high = largest_mean(torch.from_numpy(draws.mean(1)), math.log(2 / failure) / 25).numpy()
    assert ((low > shape[0] / sum(shape)) | (high < shape[0] / sum(shape))).mean() <= failure


POINTS = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.fixture(scope="module")
def losses():
    """Losses of the 2^10 one-bit solvers of one block 2 × 5, two tied layers, on four examples: (1024, 4)."""
    generator = torch.Generator().manual_seed(0)
    operator = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 1, 5, generator=generator, dtype=torch.float64)
    x = x * (torch.rand(x.shape, generator=generator) < 0.4)
    y = (operator[0] @ x.mT).mT
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=10):
        weight = 0.3 * torch.tensor(signs).reshape(1, 5, 2)
        estimate = Unrolled(operator, weight, torch.ones(2), torch.tensor([0.1, 0.05])).run(y)[-1]
        found.append((estimate - x).square().sum((-2, -1)) / 4)
    return torch.stack(found).clamp(max=1).numpy()


@pytest.mark.parametrize("code", ["uniform", "flips"])
@pytest.mark.parametrize("examples", [5, 100])
def test_all_networks_at_once_fail_no_more_often_than_stated(losses, code, examples):
    """The worst of 1,024 sign patterns on each of many samples; a code that pays less for patterns near a prior."""
    flips = np.array([sum(signs) for signs in itertools.product((1, 0), repeat=10)])  # from all signs +1
    flip_bits = np.array([math.log2(math.comb(10, k)) + math.log2(11) for k in flips])
    bits = torch.from_numpy(flip_bits if code == "flips" else np.full(1024, 10.0))
    assert float((0.5**bits).sum()) == pytest.approx(1)
    counts = np.random.default_rng(1).multinomial(examples, POINTS, size=400)
    true, failure = losses @ POINTS, 0.3
    budget = (bits * math.log(2) + math.log(1 / failure)) / examples
    failed = [
        (true > largest_mean(torch.from_numpy(losses @ count / examples), budget).numpy()).any() for count in counts
    ]
    assert np.mean(failed) <= failure
    assert np.mean([(true > losses @ count / examples).any() for count in counts]) > 0.5  # without a bound


def test_blocks_pay_for_their_own_bits_only():
    measured, bits = torch.tensor([0.1, 0.3]), torch.tensor([50.0, 200.0])
    each = [code_bound(measured[i : i + 1], bits[i], 1000, 0.025) for i in range(2)]
    assert code_bound(measured, bits, 1000, 0.05) == pytest.approx(sum(each) / 2)


@given(st.floats(0, 0.8), st.floats(0.01, 0.5), st.floats(0, 1e5), st.integers(1, 64))
def test_the_examples_for_a_gap_are_enough_and_fewer_are_not(measured, gap, bits, blocks):
    count = examples_for_gap(measured, gap, bits, 0.05, blocks)
    if measured + gap >= 1:
        assert count is None
        return
    losses = torch.full((blocks,), measured, dtype=torch.float64)
    assert code_bound(losses, bits, count, 0.05) <= measured + gap + 1e-9
    assert count == 1 or code_bound(losses, bits, count - 1, 0.05) > measured + gap - 1e-9


def test_the_interval_of_groups_narrows_with_their_number():
    widths = [high - low for low, high in (confidence_interval(0.3, count, 0.05) for count in (5, 50, 500))]
    assert widths == sorted(widths, reverse=True)
    assert confidence_interval(0.0, 10, 0.05)[0] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("measured", "bits", "examples", "failure"),
    [([1.2], 1, 10, 0.05), ([0.1], -1, 10, 0.05), ([0.1], 1, 0, 0.05), ([0.1], 1, 10, 1.0), ([math.nan], 1, 10, 0.1)],
)
def test_impossible_arguments_are_refused(measured, bits, examples, failure):
    with pytest.raises(ValueError, match="expected losses in"):
        code_bound(torch.tensor(measured), bits, examples, failure)
