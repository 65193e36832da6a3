"""The report on a solver: bounds that hold for the worst choice of signs, and what it prints."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

import pibinn_plugin as pb
from lightning_modules.analysis.finite_class import RISK_BOUNDS
from lightning_modules.analysis.generalization import generalization_bounds, tied_layers
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.operators import GaussianBlocks, SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA


def examples(operator, count, seed, **options):
    return SparseRecovery(operator, **options).draw(count, seed)


def one_bit_solver(operator, layers=2):
    return pb.prepare(CoupledISTA(operator, layers), {"layers.*.weight": None})


@pytest.fixture(scope="module")
def small():
    operator = SignBlocks(blocks=2, rows=3, columns=4)
    return one_bit_solver(operator), examples(operator, 300, 0), examples(operator, 200, 1)


def test_losses_by_hand(small):
    solver, train, test = small
    bounds = generalization_bounds(solver, train, test).classes["one-bit"]
    assert bounds.clip / 2 < train[1].square().sum(-1).mean() <= bounds.clip
    assert bounds.box.measurement / 2 < train[0].norm(dim=-1).max() <= bounds.box.measurement
    with torch.no_grad():
        loss = ((solver(test[0]) - test[1]).square().sum(-1) / bounds.clip).clamp(max=1)
    assert bounds.test_loss == pytest.approx(loss.mean().item(), rel=1e-5)
    assert bounds.box.weight / 2 < pb.global_scale(solver)().item() <= bounds.box.weight
    outlier = (torch.cat([test[0], 1e6 * torch.ones(1, 6)]), torch.cat([test[1], torch.zeros(1, 8)]))
    louder = generalization_bounds(solver, train, outlier).classes["one-bit"]
    assert louder.test_loss * 201 == pytest.approx(bounds.test_loss * 200 + 1)


def test_the_worst_choice_of_signs_is_within_the_bounds():
    """Of all 2^6 sign patterns, the one with the largest gap between a small sample and the distribution."""
    operator = GaussianBlocks(blocks=1, rows=2, columns=3)
    solver = one_bit_solver(operator, layers=1)
    train, test = (examples(operator, count, seed, sparsity=0.5) for count, seed in ((4000, 0), (20_000, 1)))
    gaps = []
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        chosen = copy.deepcopy(solver)
        with torch.no_grad():
            chosen.layers[0].parametrizations.weight.original.copy_(torch.tensor(signs).reshape(3, 2))
        report = generalization_bounds(chosen, train, test).classes["one-bit"]
        gap = report.test_loss - report.train_loss
        assert all(gap < bound for bound in report.gaps().values())
        gaps.append(gap)
    assert max(gaps) > 0
    assert not report.vacuous["union"] and not report.vacuous["global"]


def test_more_data_and_fewer_nonzeros_are_better(small):
    solver, train, test = small
    report = generalization_bounds(solver, train, test)
    for bounds in report.classes.values():
        gaps = [bounds.gaps(n) for n in (10**3, 10**6, 10**9, 10**12)]
        wider = dataclasses.replace(bounds.network_class, nonzeros=(48, 48))
        for name in RISK_BOUNDS:
            assert sorted((gap[name] for gap in gaps), reverse=True) == [gap[name] for gap in gaps]
            assert dataclasses.replace(bounds, network_class=wider).gaps()[name] > bounds.gaps()[name]
    sizes = [bounds.log_size() for bounds in report.classes.values()]
    assert sizes == sorted(sizes)


def test_the_examples_for_a_gap(small):
    bounds = generalization_bounds(*small).classes["one-bit"]
    for name in RISK_BOUNDS:
        n = bounds.examples_for(name, 0.05)
        assert bounds.gaps(n)[name] <= 0.05 < bounds.gaps(n - 1)[name]


def test_twins_have_their_own_losses_and_boxes(small):
    solver, train, test = small
    twin = CoupledISTA(solver.operator, 2)
    with torch.no_grad():
        twin.layers[0].weight.mul_(5)
    report = generalization_bounds(solver, train, test, twins={"float": twin})
    assert report.classes["float"].box.weight > report.classes["one-bit"].box.weight
    assert report.classes["float"].train_loss != report.classes["one-bit"].train_loss
    assert report.classes["ternary"].test_loss is None
    assert report.classes["ternary"].train_loss == report.classes["one-bit"].train_loss


def test_tied_layers_count_once(small):
    _, train, test = small
    tied = CoupledISTA(SignBlocks(blocks=2, rows=3, columns=4), 3)
    tied.layers = nn.ModuleList([tied.layers[0]] * 3)
    other = CoupledISTA(SignBlocks(blocks=2, rows=3, columns=4), 3)  # equal weights, but free to differ
    assert tied_layers(tied) == (0, 0, 0)
    assert tied_layers(pb.convert(one_bit_solver(other.operator, 3))) == (0, 1, 2)
    sizes = [generalization_bounds(solver, train, test).classes["one-bit"].log_size() for solver in (tied, other)]
    assert sizes[1] - sizes[0] == pytest.approx(2 * 24 * math.log(2))


def test_the_report_says_when_it_says_nothing(small):
    solver, train, test = small
    text = str(generalization_bounds(solver, train, test))
    assert "VACUOUS at N = 300: every bound of every class" in text
    assert "Assumed: 300 training examples, independent" in text
    assert "Theorem 3.3" in text
    assert max(map(len, text.splitlines())) <= 120
    line = next(line.split() for line in text.splitlines() if line.strip().startswith("one-bit"))
    bounds = generalization_bounds(solver, train, test).classes["one-bit"]
    assert line[2:6] == [f"{gap:.4g}" for gap in bounds.gaps().values()]
    assert float(line[8]) == pytest.approx(bounds.test_loss - bounds.train_loss, rel=1e-3)
    assert line[-1] == "all"


def test_a_bound_that_says_something_is_named():
    operator = GaussianBlocks(blocks=1, rows=1, columns=2)
    solver = one_bit_solver(operator, layers=1)
    text = str(generalization_bounds(solver, examples(operator, 20_000, 0), examples(operator, 10, 1)))
    assert "At N = 20,000, a bound that is not vacuous: one-bit, ternary, channel-wise, float" in text
    assert "VACUOUS" not in text


def test_what_does_not_fit_is_refused(small):
    solver, train, test = small
    with pytest.raises(pb.PIBiNNError, match="Linear has no operator"):
        generalization_bounds(nn.Linear(2, 2), train, test)
    with pytest.raises(pb.PIBiNNError, match="twins of the kinds binary"):
        generalization_bounds(solver, train, test, twins={"binary": solver})
    with pytest.raises(pb.PIBiNNError, match="twins of the kinds one bit"):
        generalization_bounds(solver, train, test, twins={"one bit": solver})
    uneven = CoupledISTA(solver.operator, 2)
    with torch.no_grad():
        uneven.layers[1].weight.mul_(2)
    with pytest.raises(pb.PIBiNNError, match=r"magnitudes from .* expected one-bit weights with one scale"):
        generalization_bounds(uneven, train, test)
    with pytest.raises(pb.PIBiNNError, match="the float twin has another operator or depth"):
        generalization_bounds(solver, train, test, twins={"float": CoupledISTA(solver.operator, 3)})
    with pytest.raises(ValueError, match=r"expected \(N, 6\) and \(N, 8\)"):
        generalization_bounds(solver, train, (test[0], test[1][:-1]))
    with pytest.raises(ValueError, match="not finite"):
        generalization_bounds(solver, (train[0] * math.nan, train[1]), test)
    with pytest.raises(pb.PIBiNNError, match="the largest norm of y is"):
        generalization_bounds(solver, (train[0] * 1e25, train[1]), test)
    with pytest.raises(ValueError, match="target_gap=0"):
        generalization_bounds(solver, train, test, target_gap=0)
