"""Matrix-free estimates of the geometry against exact values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix_operator import Matrix

from pibinn_plugin.analysis.geometry import compare_geometry
from pibinn_plugin.analysis.geometry_estimate import estimate_geometry
from pibinn_plugin.errors import StructureError

SEEDS = st.integers(0, 10_000)


def draw(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def geometry(weight, operator, **options):
    return compare_geometry({"W": weight}, operator, **options).rows["W"]


@given(st.integers(1, 30), st.integers(2, 40), SEEDS, st.booleans())
def test_estimates_keep_their_word(rows, columns, seed, adjoint):
    A, W = draw((rows, columns), seed), draw((rows, columns), seed + 1)
    sparsity = max(1, columns // 10)
    estimate = estimate_geometry(
        Matrix(W.T if adjoint else W), Matrix(A), adjoint, sparsity, 10, probes=10, iterations=20, dtype=torch.float64
    )
    exact = geometry(W, A, sparsity=sparsity, samples=10)
    largest = exact.singular_values.max().item()
    assert estimate.largest_singular_value <= largest * (1 + 1e-9) <= estimate.largest_singular_value_bound * (1 + 2e-9)
    assert estimate.coherence <= exact.coherence.item() + 1e-9
    assert estimate.distortion == pytest.approx(exact.distortion.item(), abs=1e-9)  # the same columns
    if max(np.linalg.cond(W), np.linalg.cond(A)) < 1e3:  # else conjugate gradients lose digits
        assert estimate.largest_angle <= exact.principal_angles[0].max() + 1e-3


def test_the_standard_error_is_that_of_the_estimate():
    A = draw((20, 30), 0)
    W = A + draw((20, 30), 1)
    exact = geometry(W, A).overall_alignment
    estimates = [
        estimate_geometry(Matrix(W), Matrix(A), samples=1, probes=50, iterations=1, seed=seed, dtype=torch.float64)
        for seed in range(300)
    ]
    errors = np.array([estimate.alignment - exact for estimate in estimates])
    claimed = np.array([estimate.alignment_error for estimate in estimates])
    assert abs(errors.mean()) < 4 * claimed.mean() / math.sqrt(300) + 2e-3  # a ratio of means is slightly biased
    assert 0.85 < errors.std() / claimed.mean() < 1.15


def test_the_same_map_has_alignment_one_without_error():
    estimate = estimate_geometry(Matrix(draw((6, 20), 0, torch.float32)), Matrix(2 * draw((6, 20), 0, torch.float32)))
    assert estimate.alignment == pytest.approx(1) and estimate.alignment_error < 1e-6
    text = str(estimate)
    assert "100 random sign vectors" in text and "0.001" in text and "LOWER" in text
    assert max(map(len, text.splitlines())) <= 120


def test_lanczos_stops_at_an_invariant_subspace_and_too_few_steps_say_nothing():
    isometry = Matrix(3 * torch.eye(50))
    estimate = estimate_geometry(isometry, isometry, iterations=40)
    assert estimate.largest_singular_value == pytest.approx(3, rel=1e-6)
    few = estimate_geometry(isometry, isometry, iterations=2)
    assert few.largest_singular_value_bound > 10 * few.largest_singular_value
    zero = estimate_geometry(Matrix(torch.zeros(4, 9)), Matrix(torch.ones(4, 9)))
    assert zero.largest_singular_value == 0
    assert math.isnan(zero.mean_squared_cosine)  # a matrix of zeros has no row space


@pytest.mark.parametrize("shape", [(5, 12), (30, 60)])
def test_principal_angles_are_those_of_the_decomposition(shape):
    A = draw(shape, 0)
    W = A + 0.3 * draw(shape, 1)
    angles = geometry(W, A).principal_angles[0]
    estimate = estimate_geometry(Matrix(W), Matrix(A), sparsity=2, samples=2, probes=2000, dtype=torch.float64)
    assert estimate.largest_angle == pytest.approx(angles.max().item(), abs=1e-5)
    error = estimate.mean_squared_cosine - angles.cos().square().mean().item()
    assert abs(error) < 5 * estimate.mean_squared_cosine_error < 0.05
    smaller = estimate_geometry(Matrix(W[:3]), Matrix(A[:3]), sparsity=2, samples=2, dtype=torch.float64)
    assert smaller.largest_angle == pytest.approx(geometry(W[:3], A[:3]).principal_angles[0].max().item(), abs=1e-5)


def test_row_spaces_that_are_not_reached_are_nan():
    ill = torch.diag(torch.logspace(0, -12, 60, dtype=torch.float64)) @ torch.linalg.qr(draw((60, 60), 0)).Q
    estimate = estimate_geometry(Matrix(ill), Matrix(ill), sparsity=2, samples=2, iterations=2, dtype=torch.float64)
    assert math.isnan(estimate.largest_angle)
    assert "nan" in str(estimate)


def test_impossible_estimates_are_refused():
    wide, tall = Matrix(torch.ones(2, 9)), Matrix(torch.ones(9, 2))
    with pytest.raises(StructureError, match="adjoint=False the weight is 9 x 2"):
        estimate_geometry(tall, wide)
    with pytest.raises(ValueError, match="probes=1"):
        estimate_geometry(wide, wide, probes=1)
