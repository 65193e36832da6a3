"""Bounds of the loss on new examples: losses and groups by hand, blocks, and the worst choice of signs."""

import copy
import itertools

import pytest
import torch
from eeg_files import write_small_data_set

import pibinn_plugin as pb
from lightning_modules.analysis.code_length import code_lengths
from lightning_modules.analysis.examples import (
    example_losses,
    held_out_groups,
    mean_power,
    on_device,
    training_examples,
)
from lightning_modules.analysis.generalization import FAILURE, code_bounds, generalization, separable_blocks
from lightning_modules.analysis.kl_bound import code_bound
from lightning_modules.analysis.network import float_parameters, one_bit_weights
from lightning_modules.data.eegdenoisenet import EEGDenoiseNet
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.operators import GaussianBlocks, SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA
from lightning_modules.solvers.learned_amp import LearnedAMP

OPERATOR = SignBlocks(blocks=2, rows=3, columns=4)


def one_bit(solver):
    return pb.prepare(solver, {"layers.*.weight": None})


def recovery(operator=OPERATOR, **options):
    options = {"train_examples": 300, "evaluation_examples": 200, "batch_size": 50, **options}
    data = SparseRecovery(operator, **options)
    data.setup()
    return data


@pytest.fixture(scope="module")
def report():
    untrained = one_bit(CoupledISTA(OPERATOR, 2))
    model = copy.deepcopy(untrained)
    with torch.no_grad():
        model.layers[0].parametrizations.weight.original[0, 0, 0] *= -1
    return generalization(model, recovery(), epochs=3, untrained=untrained, twin=CoupledISTA(OPERATOR, 2)), model


def test_losses_and_bounds_by_hand(report):
    found, model = report
    data = recovery()
    power = float(f"{torch.cat([x for _, x in data.val_dataloader()]).square().mean():.1e}")
    assert found.power == power == mean_power(data.val_dataloader())
    assert found.blocks == 2
    y, x = (torch.cat([data.draw_epoch(300, epoch)[part] for epoch in range(3)]) for part in range(2))
    with torch.no_grad():
        losses = ((model(y) - x).unflatten(-1, (2, 4)).square().mean(-1) / power).clamp(max=1).double()
    assert found.code.counts == (300, 900)
    torch.testing.assert_close(found.code.losses["one-bit"][1], losses.mean(0))
    torch.testing.assert_close(found.code.losses["one-bit"][0], losses[:300].mean(0))
    bits = 2 * 12 + 32 * 5  # signs of a block in two layers; step sizes, thresholds and λ
    assert found.code.bounds("one-bit")[1] == pytest.approx(code_bound(losses.mean(0), bits, 900, FAILURE))
    assert found.code.flipped == 1
    assert found.code.bits["one-bit, flips"][0] > found.code.bits["one-bit, flips"][1]
    assert found.code.trained == {"one-bit", "one-bit, flips", "float"}
    y, x = data.test_set.tensors
    with torch.no_grad():
        held_out = ((model(y) - x).unflatten(-1, (2, 4)).square().mean(-1) / power).clamp(max=1)
    assert found.held_out.measured == pytest.approx(held_out.mean().item(), rel=1e-5)
    assert found.held_out.groups == found.held_out.examples == 200


def test_the_tightest_comes_first_and_every_line_fits(report):
    text = str(report[0])
    assert text.startswith("Held out: mean loss")
    order = [
        line.split("  ")[0].strip() for line in text.splitlines() if line.startswith((" one-bit", " ternary", " float"))
    ]
    bounds = [report[0].code.bounds(scheme)[-1] for scheme in order]
    assert bounds == sorted(bounds)
    assert max(map(len, text.splitlines())) <= 120
    many = copy.copy(report[0].code)
    object.__setattr__(many, "counts", (10**6, 10**8))
    assert not str(type(report[0])(**{**vars(report[0]), "code": many})).startswith("Held out")


def test_the_worst_choice_of_signs_is_within_the_bound():
    """Of all 2^6 sign patterns, each on the training examples that it could have been chosen on."""
    operator = GaussianBlocks(blocks=1, rows=2, columns=3)
    test = [recovery(operator, sparsity=0.5).draw(20_000, seed=5)]
    samples = [training_examples(recovery(operator, sparsity=0.5, training_pairs=200, seed=s), 1) for s in range(3)]
    solver = one_bit(CoupledISTA(operator, layers=1))
    lengths, gaps = code_lengths(one_bit_weights(solver), float_parameters(solver)), []
    for signs, examples in itertools.product(itertools.product((-1.0, 1.0), repeat=6), samples):
        with torch.no_grad():
            solver.layers[0].parametrizations.weight.original.copy_(torch.tensor(signs).reshape(3, 2))
        bounds = code_bounds(lengths, {"one-bit": solver}, examples, power=0.5)
        true = example_losses(solver, test, 0.5).mean().item()
        assert true <= bounds.bounds("one-bit")[0] < 1
        gaps.append(true - bounds.losses["one-bit"][0].item())
    assert max(gaps) > 0


def test_blocks_are_found_where_they_do_not_see_each_other():
    data = recovery()
    for solver in (CoupledISTA(OPERATOR, 2), LearnedAMP(OPERATOR, 2, correction="both")):
        assert separable_blocks(one_bit(solver), one_bit_weights(solver), data) == 2

    class Mixed(CoupledISTA):
        def forward(self, y):
            return super().forward(y) + y.mean()

    mixed = one_bit(Mixed(OPERATOR, 2))
    assert separable_blocks(mixed, one_bit_weights(mixed), data) == 1
    dense = one_bit(CoupledISTA(GaussianBlocks(1, 6, 8), 2))
    assert separable_blocks(dense, one_bit_weights(dense), data) == 1


def test_examples_that_repeat_count_once():
    pairs = training_examples(recovery(training_pairs=40), epochs=12)
    assert pairs.count == pairs.of_one_epoch == sum(len(y) for y, _ in pairs.draw()) == 40
    fresh = training_examples(recovery(), epochs=12)
    assert (fresh.count, fresh.of_one_epoch) == (3600, 300)
    assert len(torch.cat([y for y, _ in fresh.draw()]).unique(dim=0)) == 3600


def test_eeg_counts_subjects(tmp_path):
    write_small_data_set(tmp_path)
    data = EEGDenoiseNet(tmp_path, batch_size=4)
    data.setup("fit")
    groups, unit = held_out_groups(data)
    assert len(groups) == len(data.test_set)
    index = [line.split(",") for line in (tmp_path / "EEG_index.csv").read_text().splitlines()]
    subject, split = index[0].index("subject"), index[0].index("split")
    expected = {row[subject] for row in index[1:] if row[split] == "test"}
    assert int(groups.max()) + 1 == len(expected)
    assert unit.startswith("subjects")
    assert "not independent" in training_examples(data, 1)


def test_what_is_not_finite_is_the_largest_loss():
    batch = (torch.zeros(3, 2), torch.ones(3, 2))
    values = torch.tensor([float("nan"), float("inf"), 1.0])
    losses = example_losses(lambda y: values[:, None].expand(3, 2), [batch], 1.0)
    assert losses.flatten().tolist() == [1.0, 1.0, 0.0]


def test_a_solver_runs_where_its_parameters_are():
    model = one_bit(CoupledISTA(OPERATOR, 2)).double()
    assert on_device(model)(torch.zeros(1, 6)).dtype == torch.float32
