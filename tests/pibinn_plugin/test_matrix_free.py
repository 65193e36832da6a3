"""Bounds from products alone, against decompositions and against the constants of the matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix_operator import Matrix

from pibinn_plugin.analysis.contraction import spectral_contraction
from pibinn_plugin.analysis.convergence import certify, certify_constants, layer_constants
from pibinn_plugin.analysis.lanczos import largest_eigenvalue
from pibinn_plugin.analysis.matrix_free import constants_from_products, contraction_from_products
from pibinn_plugin.analysis.unrolled import Unrolled
from pibinn_plugin.errors import StructureError

SEEDS = st.integers(0, 10**6)


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SEEDS, st.integers(1, 60), st.integers(1, 30), st.floats(-3, 3))
def test_lanczos_encloses_the_largest_eigenvalue(seed, size, iterations, power):
    eigenvalues = torch.linspace(0.01, 1, size, dtype=torch.float64) ** (10.0**power)
    basis = torch.linalg.qr(draw((size, size), seed)).Q
    matrix = basis @ torch.diag(eigenvalues) @ basis.mT
    low, high = largest_eigenvalue(lambda v: matrix @ v, draw((size,), seed + 1), iterations, 1e-6)
    assert low <= eigenvalues.max() * (1 + 1e-9)
    assert high >= eigenvalues.max() * (1 - 1e-9)


def test_the_upper_bound_fails_as_seldom_as_it_says_and_is_not_trivial():
    """With p = 1/2 it fails in less than half of the draws of a hard spectrum; for a smaller cosh it fails often."""
    eigenvalues = torch.cat([torch.linspace(0, 0.9, 199, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    draws = [largest_eigenvalue(lambda v: eigenvalues * v, draw((200,), seed), 5, 0.5) for seed in range(300)]
    failures = sum(high < 1 for _, high in draws) / 300
    assert failures <= 0.5
    assert sum(low < 0.97 for low, _ in draws) / 300 > 0.3  # the Ritz value alone is no bound
    tighter = largest_eigenvalue(lambda v: eigenvalues * v, draw((200,), 0), 60, 1e-6)
    assert 1 <= tighter[1] < 1.1


@given(SEEDS, st.integers(1, 5), st.integers(2, 9), st.integers(1, 4))
def test_constants_from_products_are_those_of_the_matrices(seed, m, n, chunk):
    operator, weights = draw((m, n), seed), draw((2, n, m), seed + 1)
    step_sizes = torch.tensor([0.5, -0.3], dtype=torch.float64)
    exact = layer_constants(Unrolled(operator[None], weights[:, None], step_sizes))
    found = constants_from_products(
        [Matrix(weight) for weight in weights], Matrix(operator), step_sizes, chunk, torch.float64
    )
    for name in ("diagonal", "coherence", "noise_gain", "factors"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name))
    unrolled = Unrolled(operator[None], weights[:, None], step_sizes)
    for one, other in zip(
        certify(unrolled, 2, 1.0, 0.1).errors, certify_constants(found, None, 2, 1.0, 0.1).errors, strict=True
    ):
        torch.testing.assert_close(one, other)


@given(SEEDS)
def test_contraction_from_products_encloses_the_norm(seed):
    operator, weight = draw((8, 12), seed), 0.1 * draw((12, 8), seed + 1)
    exact = float(spectral_contraction(Unrolled(operator[None], weight[None], torch.tensor([0.7]))).upper)
    low, high = contraction_from_products(
        Matrix(weight), Matrix(operator), 0.7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert low <= exact * (1 + 1e-6)
    assert exact * (1 - 1e-6) <= high < 1.2 * exact


def test_a_large_operator_needs_no_matrix():
    """Finite differences of a million unknowns: I - g Dᵀ D has the norm 1, for g below 1/2."""

    class Differences:
        shape = (10**6, 10**6)

        def A(self, x):
            return x - x.roll(1, -1)

        def A_adjoint(self, y):
            return y - y.roll(-1, -1)

    class Adjoint(Differences):
        A, A_adjoint = Differences.A_adjoint, Differences.A

    low, high = contraction_from_products(Adjoint(), Differences(), 0.25, iterations=10)
    assert low <= 1.0001
    assert high >= 0.9999


def test_what_does_not_fit_is_refused():
    square = Matrix(torch.eye(3))
    with pytest.raises(StructureError, match="2 weights and 1 step sizes"):
        constants_from_products([square, square], square, torch.ones(1))
    with pytest.raises(StructureError, match=r"a product has the shape \(3, 4\)"):
        constants_from_products([Matrix(torch.ones(4, 3))], square, torch.ones(1))
    with pytest.raises(StructureError, match="expected finite numbers"):
        constants_from_products([Matrix(math.nan * torch.eye(3))], square, torch.ones(1))
    with pytest.raises(StructureError, match=r"expected \(3, 2\)"):
        contraction_from_products(square, Matrix(torch.ones(2, 3)), 1.0)
    with pytest.raises(ValueError, match="at least one iteration"):
        contraction_from_products(square, square, 1.0, iterations=0)
