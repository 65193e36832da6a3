"""Bounds of stability are above whatever is found; what is found is exact where it can be enumerated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.analysis.stability import stability
from lightning_modules.analysis.unrolled import Unrolled

FRACTION = 0.05


def random_unrolled(seed, layers=3, blocks=2, m=3, n=4):
    generator = torch.Generator().manual_seed(seed)
    operator = torch.randn(blocks, m, n, generator=generator) / m**0.5
    weights = operator.mT + 0.2 * torch.randn(layers, blocks, n, m, generator=generator)
    step_sizes = 0.3 + 0.3 * torch.rand(layers, generator=generator)
    unrolled = Unrolled(operator, weights, step_sizes, 0.1 * torch.rand(layers, generator=generator))
    return unrolled, torch.randn(5, blocks, m, generator=generator, dtype=torch.float64)


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_bounds_are_above_what_is_found(seed):
    unrolled, y = random_unrolled(seed)
    report = stability(unrolled, y, FRACTION)
    for name in ("measurements", "operator", "flip"):
        assert (getattr(report, name) <= getattr(report, f"{name}_bound") * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(3))
def test_jacobians_are_those_of_autograd(seed):
    unrolled, y = random_unrolled(seed)
    expected = torch.zeros(3)
    for example in y:
        jacobian = torch.autograd.functional.jacobian(lambda e: unrolled.run(e[None])[1:, 0], example)
        for block in range(2):
            norms = torch.linalg.matrix_norm(jacobian[:, block, :, block], 2)
            expected = torch.maximum(expected, norms)
    torch.testing.assert_close(stability(unrolled, y).measurements, expected.double())


@pytest.mark.parametrize("seed", range(3))
def test_flips_are_the_worst_of_all_flips(seed):
    unrolled, y = random_unrolled(seed)
    output = unrolled.run(y)[-1]
    report = stability(unrolled, y)
    for layer in range(3):
        worst = 0.0
        for block in range(2):
            for row in range(4):
                for column in range(3):
                    weights = unrolled.weights.clone()
                    weights[layer, block, row, column] *= -1
                    flipped = Unrolled(unrolled.operator, weights, unrolled.step_sizes, unrolled.thresholds)
                    worst = max(worst, float((flipped.run(y)[-1] - output).norm(dim=-1).max()))
        assert report.flip[layer] == pytest.approx(worst / float(output.norm(dim=-1).max()))


@pytest.mark.parametrize("seed", range(3))
def test_the_operator_found_is_worse_than_random_ones_and_within_the_bound(seed):
    unrolled, y = random_unrolled(seed)
    iterates, report = unrolled.run(y), stability(unrolled, y, FRACTION)
    longest = iterates[-1].norm(dim=-1).max()
    norms = torch.linalg.matrix_norm(unrolled.operator, 2)
    generator = torch.Generator().manual_seed(seed)
    worst = torch.zeros(3, dtype=torch.float64)
    for _ in range(300):
        change = torch.randn(unrolled.operator.shape, generator=generator, dtype=torch.float64)
        change *= FRACTION * (norms / torch.linalg.matrix_norm(change, 2))[:, None, None]
        changed = Unrolled(unrolled.operator + change, unrolled.weights, unrolled.step_sizes, unrolled.thresholds)
        moved = (changed.run(y) - iterates)[1:].norm(dim=-1).amax((1, 2)) / longest
        worst = torch.maximum(worst, moved)
    assert (worst <= report.operator_bound * (1 + 1e-9)).all()
    assert report.operator[-1] >= worst[-1]


def test_the_bound_of_measurements_is_attained_without_thresholds():
    """Square, nothing thresholded, one eigenvector all along."""
    unrolled = Unrolled(torch.eye(2)[None], 0.5 * torch.eye(2)[None], torch.ones(4), torch.zeros(4))
    report = stability(unrolled, torch.ones(1, 1, 2))
    torch.testing.assert_close(report.measurements, report.measurements_bound)
    assert max(map(len, str(report).splitlines())) <= 120
