"""One-bit regression against its definition: enumeration, numpy's least squares, a known operator, symmetries."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pibinn_plugin as pb
from pibinn_plugin.initialization.sign_regression import (
    PairStatistics,
    box_weights,
    flip_one_sign_a_row,
    one_bit_start,
    ridge_weights,
)

# A structure of each kind, with shapes that it fits.
STRUCTURES = [
    (pb.Dense(), (4, 6)),
    (pb.BlockDiagonal(3), (6, 12)),
    (pb.BlockDiagonal(rows=(1, 3), columns=(4, 2)), (4, 6)),
    (pb.BlockDiagonal(2, row_order=(2, 0, 3, 1), column_order=(5, 1, 0, 2, 4, 3)), (4, 6)),
    (pb.Banded(1, 2), (5, 7)),
    (pb.Mask([[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1], [0, 1, 0, 0]]), (4, 4)),
    (pb.Mask(torch.ones(3, 2, 2, 1).tril(2)), (3, 2, 2, 1)),
]


def statistics_of(structure, shape, x, y):
    statistics = PairStatistics(structure, shape)
    statistics.add(x, y)
    return statistics


def random_problem(structure, shape, pairs, noise, seed):
    """Pairs of a random ±0.7 operator: its dense matrix, the inputs and the outputs."""
    random = np.random.default_rng(seed)
    mask = structure.mask(shape).reshape(shape[0], -1)
    operator = torch.from_numpy(random.choice([-0.7, 0.7], mask.shape)) * mask
    x = torch.from_numpy(random.standard_normal((pairs, mask.shape[1])))
    return operator, x, x @ operator.T + noise * torch.from_numpy(random.standard_normal((pairs, mask.shape[0])))


def dense(structure, shape, compact):
    return structure.to_dense(compact, shape).reshape(shape[0], -1)


def error(weight, x, y):
    return (y - x @ weight.T).square().sum().item()


@pytest.mark.parametrize(("structure", "shape"), STRUCTURES)
def test_a_sign_operator_is_recovered_from_enough_pairs(structure, shape):
    operator, x, y = random_problem(structure, shape, 60, 0.0, seed=1)
    start = one_bit_start(statistics_of(structure, shape, x, y))
    assert start.latent.shape == structure.compact_shape(shape)
    assert torch.equal(dense(structure, shape, start.latent).sign(), operator.sign())
    assert start.scale == pytest.approx(0.7)
    assert start.latent.abs().min() >= 0.2 * start.scale * (1 - 1e-9)


@pytest.mark.parametrize(("structure", "shape"), STRUCTURES)
def test_ridge_is_the_least_squares_of_each_row_on_its_columns(structure, shape):
    _, x, y = random_problem(structure, shape, 9, 0.5, seed=2)
    found = dense(structure, shape, ridge_weights(statistics_of(structure, shape, x, y)))
    mask = structure.mask(shape).reshape(found.shape)
    # The penalty: the mean power of the inputs that a group of rows looks at.
    groups = PairStatistics(structure, shape).groups
    looked_at = torch.cat([group.columns.flatten() for group in groups])
    penalty = x.square().mean(0)[looked_at].mean().item()
    for row, columns in enumerate(mask):
        part = x[:, columns].numpy()
        augmented = np.vstack([part, np.sqrt(penalty) * np.eye(part.shape[1])])
        target = np.concatenate([y[:, row].numpy(), np.zeros(part.shape[1])])
        if columns.any():
            np.testing.assert_allclose(found[row, columns], np.linalg.lstsq(augmented, target, rcond=None)[0])


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([4, 8, 30]), st.sampled_from([0.0, 0.3, 2.0]))
def test_enumeration_bounds_the_error_and_is_reached_where_pairs_suffice(seed, pairs, noise):
    structure, shape = pb.BlockDiagonal(2), (4, 10)
    _, x, y = random_problem(structure, shape, pairs, noise, seed)
    start = one_bit_start(statistics_of(structure, shape, x, y))
    found = start.scale * dense(structure, shape, start.latent).sign()
    least = 0.0
    for row in range(4):
        columns = structure.mask(shape)[row]
        patterns = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
        errors = (y[:, row, None] - start.scale * x[:, columns] @ patterns.T).square().sum(0)
        least += errors.min().item()
    assert error(found, x, y) >= least - 1e-9
    if pairs == 30 and noise <= 0.3:
        assert error(found, x, y) == pytest.approx(least, rel=1e-6, abs=1e-6)
    # λ is the best for these signs: no other is better.
    for factor in (0.99, 1.01):
        assert error(found, x, y) <= error(factor * found, x, y) + 1e-9


@given(st.integers(0, 10_000))
def test_every_round_of_flips_lowers_the_error_of_each_row(seed):
    _, x, y = random_problem(pb.Dense(), (3, 8), 6, 1.0, seed)
    signs = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], (3, 8)))
    for _ in range(40):
        flipped = flip_one_sign_a_row(signs, x.T @ x, y.T @ x, 0.7)
        before, after = ((y - 0.7 * x @ each.T).square().sum(0) for each in (signs, flipped))
        changes = (signs != flipped).sum(-1)
        assert changes.max() <= 1
        assert (after[changes == 1] < before[changes == 1]).all()
        if changes.sum() == 0:
            break
        signs = flipped
    assert changes.sum() == 0  # it ends: no single flip of any row is better
    for row, column in itertools.product(range(3), range(8)):
        other = signs.clone()
        other[row, column] *= -1
        assert error(0.7 * other, x, y) >= error(0.7 * signs, x, y) - 1e-4


@given(st.integers(0, 10_000), st.one_of(st.none(), st.floats(0.05, 2)), st.sampled_from([0, 1]))
def test_the_box_solution_has_no_duality_gap(seed, known, decades):
    structure, shape = pb.BlockDiagonal(2), (4, 10)
    _, x, y = random_problem(structure, shape, 12, 0.5, seed)
    # The eigenvalues of XᵀX span twice as many decades as the inputs.
    x = x * torch.logspace(-decades, 0, 5, dtype=torch.float64).repeat(2)
    compact, scale = box_weights(statistics_of(structure, shape, x, y), known)
    assert known in (None, scale)
    assert compact.abs().max() <= scale
    weight = dense(structure, shape, compact)
    gradient = (weight @ x.T - y.T) @ x * structure.mask(shape)
    # No other weight in the box has an error that is lower by more than twice this (Frank and Wolfe, 1956).
    gap = (gradient * weight).sum() + scale * gradient.abs().sum()
    assert gap <= 1e-6 * y.square().sum()


@settings(max_examples=10)
@given(st.integers(0, 10_000), st.sampled_from([(24, 0.1), (40, 0.5), (3000, 2.0)]), st.sampled_from([0, 3]))
def test_the_estimated_bound_is_near_the_true_scale_however_unlike_the_inputs_are(seed, pairs_and_noise, decades):
    """With few pairs, much noise, eigenvalues all alike, or spread over six decades with most below the noise."""
    structure, shape, (pairs, noise) = pb.BlockDiagonal(2), (64, 64), pairs_and_noise
    operator, x, _ = random_problem(structure, shape, pairs, 0.0, seed)
    x = x * torch.logspace(-decades, 0, 32, dtype=torch.float64).repeat(2)
    y = x @ operator.T
    y = y + noise * 0.1 * torch.from_numpy(np.random.default_rng(seed).standard_normal(y.shape))
    assert box_weights(statistics_of(structure, shape, x, y)).scale == pytest.approx(0.7, rel=0.15)


def test_a_known_scale_is_kept_and_finds_no_fewer_signs():
    structure, shape = pb.Dense(), (16, 32)
    operator, x, y = random_problem(structure, shape, 26, 0.1, seed=6)
    statistics = statistics_of(structure, shape, x, y)
    known, estimated = one_bit_start(statistics, 0.7), one_bit_start(statistics)
    assert known.scale == 0.7 != estimated.scale
    right = [(start.latent.sign() == operator.sign()).sum() for start in (known, estimated)]
    assert right[0] > 0.95 * operator.numel()
    assert right[0] >= 0.98 * right[1]


@settings(max_examples=8)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_symmetries(seed, factor):
    structure, shape = pb.BlockDiagonal(2), (6, 8)
    _, x, y = random_problem(structure, shape, 12, 0.2, seed)
    start = one_bit_start(statistics_of(structure, shape, x, y))

    order = torch.randperm(len(x))
    same = one_bit_start(statistics_of(structure, shape, x[order], y[order]))
    torch.testing.assert_close(same.latent, start.latent)

    for inputs, outputs, ratio in ((x, factor * y, factor), (factor * x, y, 1 / factor)):
        scaled = one_bit_start(statistics_of(structure, shape, inputs, outputs))
        torch.testing.assert_close(scaled.latent, ratio * start.latent)
        assert scaled.scale == pytest.approx(ratio * start.scale)

    swapped = one_bit_start(statistics_of(structure, shape, x.roll(4, 1), y.roll(3, 1)))
    torch.testing.assert_close(swapped.latent, start.latent.flip(0))


def test_batches_add_up():
    _, x, y = random_problem(pb.Banded(1, 2), (5, 7), 30, 0.2, seed=3)
    whole = statistics_of(pb.Banded(1, 2), (5, 7), x, y)
    batches = PairStatistics(pb.Banded(1, 2), (5, 7))
    for first in range(0, 30, 7):
        batches.add(x[first : first + 7], y[first : first + 7])
    assert batches.pairs == 30
    torch.testing.assert_close(one_bit_start(batches), one_bit_start(whole))


def test_memory_goes_with_the_blocks():
    statistics = PairStatistics(pb.BlockDiagonal(64), (64 * 8, 64 * 16))
    (group,) = statistics.groups
    assert (group.gram.shape, group.cross.shape) == ((64, 16, 16), (64, 8, 16))


def test_a_constant_input_that_never_occurs_leaves_the_rest_alone():
    operator, x, y = random_problem(pb.Dense(), (4, 6), 60, 0.0, seed=4)
    y = y - x[:, 2:3] @ operator[:, 2:3].T
    x[:, 2] = 0
    start = one_bit_start(statistics_of(pb.Dense(), (4, 6), x, y))
    others = [0, 1, 3, 4, 5]
    assert torch.equal(start.latent.sign()[:, others], operator.sign()[:, others])
    assert start.scale == pytest.approx(0.7)


def test_what_pairs_cannot_be_is_said():
    statistics = PairStatistics(pb.BlockDiagonal(2), (4, 6))
    with pytest.raises(pb.PIBiNNError, match="no pairs"):
        one_bit_start(statistics)
    for x, y in (
        (torch.ones(3, 4), torch.ones(3, 6)),
        (torch.ones(3, 6), torch.ones(2, 4)),
        (torch.ones(6), torch.ones(4)),
    ):
        with pytest.raises(pb.PIBiNNError, match=r"maps inputs \(pairs, 6\) to outputs \(pairs, 4\)"):
            statistics.add(x, y)
    for x, y, role in (
        (torch.full((3, 6), torch.nan), torch.ones(3, 4), "inputs"),
        (torch.ones(3, 6), torch.full((3, 4), torch.inf), "outputs"),
    ):
        with pytest.raises(pb.PIBiNNError, match=f"the {role} of 3 pairs hold NaN or infinite"):
            statistics.add(x, y)
    assert statistics.pairs == 0
    with pytest.raises(pb.PIBiNNError, match="all 3 pairs are zero"):
        one_bit_start(statistics_of(pb.Dense(), (4, 6), torch.zeros(3, 6), torch.ones(3, 4)))
    with pytest.raises(pb.ScaleError, match="expected a positive one"):
        one_bit_start(statistics_of(pb.Dense(), (4, 6), torch.ones(3, 6), torch.zeros(3, 4)))
    for scale in (0.0, -0.7, float("nan")):
        with pytest.raises(pb.ScaleError, match="expected a positive one"):
            box_weights(statistics_of(pb.Dense(), (4, 6), torch.ones(3, 6), torch.ones(3, 4)), scale)
    with pytest.raises(pb.StructureError, match="3 equal blocks"):
        PairStatistics(pb.BlockDiagonal(3), (4, 6))
