"""The pseudo-likelihood against probabilities of whole states, its gradient, its metric and its loss."""

import pytest
import torch

from lightning_modules.pseudo_likelihood import (
    PseudoLikelihood,
    PseudoLikelihoodLoss,
    negative_log_pseudo_likelihood,
)
from lightning_modules.solvers.local_fields import local_fields


def draw(count=5, size=4):
    generator = torch.Generator().manual_seed(0)
    spins = torch.randint(2, (count, size, size), generator=generator) * 2.0 - 1.0
    return spins.double(), torch.randn(2, size, size, generator=generator, dtype=torch.float64)


def log_weight(spins, couplings):
    """Log of the probability of whole states, but for a constant."""
    right, down = couplings
    return (right * spins * spins.roll(-1, -1) + down * spins * spins.roll(-1, -2)).sum((-2, -1))


def test_it_is_the_probability_of_a_spin_among_the_two_states_that_differ_in_it():
    spins, couplings = draw()
    found = negative_log_pseudo_likelihood(local_fields(spins, couplings), spins)
    for row in range(4):
        for column in range(4):
            flipped = spins.clone()
            flipped[:, row, column] *= -1
            both = torch.stack([log_weight(spins, couplings), log_weight(flipped, couplings)])
            torch.testing.assert_close(found[:, row, column], -torch.log_softmax(both, 0)[0])


def test_the_gradient_of_a_coupling_comes_from_both_of_its_ends():
    spins, couplings = draw()
    couplings.requires_grad_()
    fields = local_fields(spins, couplings)
    negative_log_pseudo_likelihood(fields, spins).sum().backward()
    surprise = spins - torch.tanh(fields.detach())
    neighbours = torch.stack([spins.roll(-1, -1), spins.roll(-1, -2)], 1)
    surprises = torch.stack([surprise.roll(-1, -1), surprise.roll(-1, -2)], 1)
    expected = -(surprise.unsqueeze(1) * neighbours + spins.unsqueeze(1) * surprises).sum(0)
    torch.testing.assert_close(couplings.grad, expected)


def test_metric_and_loss_are_means_over_all_spins():
    fields, spins = torch.randn(7, 4, 4), torch.randint(2, (7, 4, 4)) * 2.0 - 1.0
    expected = torch.log1p(torch.exp(-2 * fields * spins)).mean()
    metric = PseudoLikelihood()
    metric.update(fields[:2], spins[:2])
    metric.update(fields[2:], spins[2:])
    torch.testing.assert_close(metric.compute(), expected)
    torch.testing.assert_close(PseudoLikelihoodLoss()(fields, spins), expected)


def test_large_fields_do_not_overflow():
    values = negative_log_pseudo_likelihood(torch.tensor([1e4, -1e4]), torch.ones(2))
    assert values.tolist() == [0.0, 2e4]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="must be equal"):
        PseudoLikelihoodLoss()(torch.ones(2, 4, 4), torch.ones(2, 4))
