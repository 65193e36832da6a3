"""The operator of single-pixel imaging: its matrix, its adjoint, and its recovery from pairs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pibinn_plugin as pb
from lightning_modules.block_patterns import BlockPatterns, LearnedBlockPatterns
from lightning_modules.pattern_calibration import SignsFromBlocks, block_pairs


@settings(deadline=None, max_examples=20)
@given(
    block=st.integers(3, 6), measurements=st.integers(1, 8), rows=st.integers(1, 3), columns=st.integers(1, 3),
    learned=st.booleans(),
)  # fmt: skip
def test_adjoint(block, measurements, rows, columns, learned):
    operator = (LearnedBlockPatterns if learned else BlockPatterns)(block, measurements)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, rows * block, columns * block, generator=generator)
    y = torch.randn(2, measurements, rows, columns, generator=generator)
    left, right = (operator.A(x) * y).sum(), (x * operator.A_adjoint(y)).sum()
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_pseudo_inverse_agrees_with_numpy():
    operator = BlockPatterns(block_size=4, measurements=6)
    y = torch.randn(2, 6, 3, 2)
    expected = torch.einsum("pm,bmhw->bhwp", torch.linalg.pinv(operator.patterns), y)
    _, inputs = block_pairs(y, operator.A_dagger(y))
    torch.testing.assert_close(inputs, expected.flatten(0, 2), atol=1e-3, rtol=0)


def test_linear_estimate_beats_the_pseudo_inverse_on_smooth_images():
    operator = BlockPatterns(block_size=8, measurements=16)
    ramp = torch.linspace(0, 1, 32)
    x = (0.3 * ramp.view(1, 1, -1, 1) + 0.5 * ramp).expand(1, 1, 32, 32)
    estimate, projection = operator.linear_estimate(operator.A(x)), operator.A_dagger(operator.A(x))
    assert (estimate - x).square().mean() < 0.01 * (projection - x).square().mean()


@pytest.mark.parametrize(
    ("correlation", "model"),
    [
        ("separable", lambda down, along: 0.9 ** (down + along)),
        ("isotropic", lambda down, along: 0.95 ** math.hypot(down, along)),
    ],
)
def test_the_covariance_is_that_of_the_pixels_distance(correlation, model):
    covariance = BlockPatterns(block_size=4, measurements=6, correlation=correlation).covariance
    for first, second in [(0, 0), (0, 3), (1, 14), (5, 10), (15, 0)]:
        down, along = abs(first // 4 - second // 4), abs(first % 4 - second % 4)
        assert covariance[first, second].item() == pytest.approx(4 + model(down, along), rel=1e-6)


def test_evaluated_patterns_are_those_of_the_operator():
    operator, x = LearnedBlockPatterns(block_size=4, measurements=6), torch.rand(2, 1, 8, 12)
    evaluated = operator.evaluated()
    assert torch.equal(evaluated.A(x), operator.A(x))
    assert torch.equal(evaluated.A_dagger(operator.A(x)), operator.A_dagger(operator.A(x)))
    with torch.no_grad():
        operator.weight.mul_(2)
    torch.testing.assert_close(operator.evaluated().A(x), operator.A(x))


def test_every_block_is_measured_with_the_same_patterns():
    operator = BlockPatterns(block_size=4, measurements=5, seed=1)
    x = torch.rand(1, 1, 8, 12)
    for row in range(2):
        for column in range(3):
            block = x[0, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
            torch.testing.assert_close(operator.A(x)[0, :, row, column], operator.patterns @ block)


def test_patterns_are_signs_of_unit_norm_from_the_seed():
    patterns = BlockPatterns(block_size=8, measurements=32, seed=2).patterns
    assert patterns.abs().unique().tolist() == [1 / 8]
    assert abs(float(patterns.mean())) < 0.01
    assert torch.equal(patterns, BlockPatterns(8, 32, seed=2).patterns)
    assert not torch.equal(patterns, BlockPatterns(8, 32, seed=3).patterns)


def test_learned_patterns_start_at_given_ones_and_leave_them_alone():
    truth, x = BlockPatterns(block_size=4, measurements=5), torch.rand(2, 1, 8, 12)
    learned = LearnedBlockPatterns(4, 5, patterns=truth)
    assert torch.equal(learned.A(x), truth.A(x))
    with torch.no_grad():
        learned.weight.zero_()
    assert truth.patterns.abs().min() > 0
    with pytest.raises(ValueError, match="shape"):
        LearnedBlockPatterns(4, 6, patterns=truth)


def test_known_patterns_are_in_no_file():
    assert BlockPatterns().state_dict() == {}


def test_pairs_are_those_of_the_operator():
    operator = BlockPatterns(block_size=4, measurements=5)
    x = torch.rand(3, 1, 8, 16)
    outputs, inputs = block_pairs(operator.A(x), x)
    assert inputs.shape == (24, 16)
    torch.testing.assert_close(outputs, inputs @ operator.patterns.T)


def recovered(truth, x):
    """The patterns learned from patches x in two batches."""
    learned = pb.prepare(LearnedBlockPatterns(truth.block_size, truth.shape[0]), {"weight": None})
    SignsFromBlocks(truth.block_size)(learned, [(truth.A(part), part) for part in (x[:1], x[1:])])
    return learned.weight.detach()


def test_patterns_are_recovered_from_fewer_pairs_than_pixels():
    truth = BlockPatterns(block_size=8, measurements=8, seed=5)
    x = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))  # 48 pairs for 64 pixels
    torch.testing.assert_close(recovered(truth, x), truth.patterns)
    assert not torch.allclose(recovered(truth, x[:2, :, :16]), truth.patterns)  # 16 pairs do not tell


def test_patterns_are_recovered_from_smooth_images():
    truth = BlockPatterns(block_size=8, measurements=8, seed=5)
    x = torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3) / 100
    _, pixels = block_pairs(truth.A(x), x)
    assert torch.linalg.cond(pixels) > 1e3
    torch.testing.assert_close(recovered(truth, x), truth.patterns)


def test_blocks_are_read_up_to_their_number():
    x = torch.rand(3, 1, 8, 16)
    pairs = list(SignsFromBlocks(4, max_pairs=10).pairs([(BlockPatterns(4, 5).A(x), x)] * 2))
    assert [(len(inputs), len(outputs)) for inputs, outputs in pairs] == [(10, 10)]


def test_what_patterns_cannot_start_from_is_refused():
    learned, x = pb.prepare(LearnedBlockPatterns(4, 4), {"weight": None}), torch.rand(1, 1, 16, 16)
    with pytest.raises(pb.TargetError, match="'nothing' names no weight of the prepared model"):
        SignsFromBlocks(4, weights="nothing")(learned, [])
    with pytest.raises(pb.PIBiNNError, match="are of blocks of 64 pixels; block_size=4 expects 16"):
        SignsFromBlocks(4)(learned, [(BlockPatterns(8, 4).A(x), x)])
    with pytest.raises(pb.PIBiNNError, match=r"maps inputs \(pairs, 16\).* got inputs \(4, 64\)"):
        SignsFromBlocks(8)(learned, [(BlockPatterns(8, 4).A(x), x)])


@pytest.mark.parametrize("kind", [BlockPatterns, LearnedBlockPatterns])
def test_unfit_arguments_and_images_are_refused(kind):
    for measurements in (0, 257):
        with pytest.raises(ValueError, match=f"measurements={measurements}"):
            kind(measurements=measurements)
    with pytest.raises(ValueError, match=r"\(1, 1, 20, 32\).*multiples of 16"):
        kind().A(torch.zeros(1, 1, 20, 32))


def test_an_unknown_correlation_is_refused():
    with pytest.raises(ValueError, match="correlation='round': expected one of separable, isotropic"):
        BlockPatterns(correlation="round")
