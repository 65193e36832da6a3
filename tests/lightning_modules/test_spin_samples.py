"""Samples of a spin glass: heat bath against exact enumeration, the checkerboard, seeds, epochs, and the test set."""

import itertools

import numpy as np
import pytest
import torch

from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader
from lightning_modules.data.spin_samples import SpinSamples, heat_bath
from lightning_modules.metrics import NMSE, SignAccuracy
from lightning_modules.solvers.local_fields import local_fields


def glass(coupling, size=4, seed=3):
    return SpinSamples(size, coupling, training_samples=8, validation_samples=4, seed=seed).couplings


def pair_products(spins):
    return torch.stack([spins * spins.roll(-1, -1), spins * spins.roll(-1, -2)], 1)


def exact_correlations(couplings):
    """<s_i s_j> on every edge of a 4 × 4 torus, over its 65,536 states."""
    states = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=16)), dtype=torch.float64).reshape(-1, 4, 4)
    products = pair_products(states)
    energies = (products * couplings.double()).sum((1, 2, 3))
    probabilities = torch.softmax(energies, 0)
    return torch.einsum("n,nkij->kij", probabilities, products)


@pytest.mark.parametrize("coupling", [0.2, 0.6])
def test_correlations_are_those_of_the_enumerated_distribution(coupling):
    couplings = glass(coupling)
    count = 10_000
    spins = heat_bath(couplings, count, sweeps=60, generator=torch.Generator().manual_seed(0))
    found = pair_products(spins).mean(0)
    # A mean of as many products of -1 and 1 deviates by at most 1 / √count; 32 of them by no more than four of these.
    torch.testing.assert_close(found, exact_correlations(couplings).float(), rtol=0, atol=4 / count**0.5)
    assert spins.mean((0, 1, 2)).abs() < 4 / count**0.5  # no field points anywhere


def test_the_half_drawn_last_is_independent_given_the_other():
    """After one sweep from random spins the chain is far from equilibrium; the second half is exactly conditional."""
    couplings, count = glass(0.8, size=6), 40_000
    spins = heat_bath(couplings, count, sweeps=1, generator=torch.Generator().manual_seed(1))
    residuals = (spins - torch.tanh(local_fields(spins, couplings))).flatten(1)
    is_odd = ((torch.arange(6)[:, None] + torch.arange(6)) % 2 == 1).flatten()
    odd, even = residuals[:, is_odd], residuals[:, ~is_odd]
    covariance = odd.T @ odd / count
    assert odd.mean(0).abs().max() < 4.5 / count**0.5
    assert (covariance - covariance.diag().diag()).abs().max() < 4.5 / count**0.5
    assert even.mean(0).abs().max() < 4.5 / count**0.5  # by symmetry
    between = even.T @ even / count
    assert (between - between.diag().diag()).abs().max() > 4.5 / count**0.5


def test_couplings_and_samples_come_from_the_seed_alone():
    def draw(seed):
        torch.randn(3)  # the global random state plays no part
        data = SpinSamples(size=4, training_samples=16, validation_samples=16, sweeps=20, seed=seed)
        data.setup()
        return data.couplings, data.train_set.samples, data.val_set.tensors[0]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert not torch.equal(first[1], first[2])
    assert set(first[0].abs().flatten().tolist()) == {np.float32(0.6)}


def test_an_epoch_goes_through_all_samples_once_in_an_order_of_its_own():
    data = SpinSamples(size=4, training_samples=24, validation_samples=4, batch_size=8, sweeps=5)
    data.setup("fit")
    own = sorted(map(str, data.train_set.samples.tolist()))
    epochs = []
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert all(torch.equal(y, x) for y, x in batches)
        epochs.append(torch.cat([y for y, _ in batches]))
        assert sorted(map(str, epochs[-1].tolist())) == own
    assert not torch.equal(*epochs)
    joined = list(ResumableLoader(data.train_set, 8, EpochSampler(24)))
    parts = [list(ResumableLoader(data.train_set, 4, EpochSampler(24, 2, rank))) for rank in range(2)]
    for both, first, second in zip(joined, *parts, strict=True):
        assert torch.equal(both[0][0::2], first[0])
        assert torch.equal(both[0][1::2], second[0])


def test_metrics_of_the_test_set_are_those_of_the_couplings():
    data = SpinSamples(size=6, training_samples=4, validation_samples=1, sweeps=1)
    data.setup("test")
    assert not hasattr(data, "train_set")
    estimate = data.couplings + 0.5 * torch.randn(2, 6, 6)
    error, accuracy = NMSE(), SignAccuracy()
    for single, fields in data.test_dataloader():
        error.update(local_fields(single, estimate), fields)
        accuracy.update(local_fields(single, estimate), fields)
    ratio = (estimate - data.couplings).square().sum() / data.couplings.square().sum()
    torch.testing.assert_close(error.compute(), 10 * ratio.log10())
    right = (estimate.sign() == data.couplings.sign()).float().mean()
    torch.testing.assert_close(accuracy.compute(), right)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 5},
        {"size": 2},
        {"coupling": 0.0},
        {"coupling": float("nan")},
        {"coupling": float("inf")},
        {"training_samples": 0},
        {"validation_samples": 0},
        {"sweeps": 0},
        {"batch_size": 41},
        {"batch_size": 0},
        {"seed": -1},
    ],
)
def test_arguments_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}(=| is ){next(iter(wrong.values()))}"):
        SpinSamples(**wrong)
