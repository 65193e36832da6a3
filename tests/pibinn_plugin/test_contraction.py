"""Spectral contraction and the existence of contracting signs, against exact values and enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.operators import BlockOperator, GaussianBlocks, SignBlocks
from pibinn_plugin.analysis.contraction import one_bit_existence, sign_adjoint_moments, spectral_contraction
from pibinn_plugin.analysis.convergence import layer_constants
from pibinn_plugin.analysis.unrolled import Unrolled

SLACK = 1 + 1e-9


def random_unrolled(generator, layers=4, perturbation=0.05):
    """A nearly orthogonal square or tall operator and float weights near its adjoint."""
    blocks, n = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 4), (2, 7)))
    m = n + int(torch.randint(0, 4, (), generator=generator))
    operator = torch.eye(m, n) + perturbation * torch.randn(blocks, m, n, generator=generator)
    weights = operator.mT + 0.3 * perturbation * torch.randn(layers, blocks, n, m, generator=generator)
    return Unrolled(operator, weights, 0.6 + 0.6 * torch.rand(layers, generator=generator))


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_power_iteration_encloses_the_spectral_norm(seed):
    generator = torch.Generator().manual_seed(seed)
    unrolled = random_unrolled(generator, perturbation=0.3)
    exact = spectral_contraction(unrolled)
    dense = torch.eye(unrolled.operator.shape[-1]) - unrolled.step_sizes[:, None, None, None] * (
        unrolled.weights @ unrolled.operator
    )
    torch.testing.assert_close(exact.upper, torch.linalg.svdvals(dense).amax(-1))
    enclosed = spectral_contraction(unrolled, exact_up_to=0, generator=generator)
    assert (enclosed.lower <= exact.lower * SLACK).all()
    assert (enclosed.upper >= exact.upper / SLACK).all()
    assert (enclosed.upper / enclosed.lower).max() < 1.06


def test_spectral_contraction_of_a_wide_operator_is_never_below_one():
    operator = GaussianBlocks(2, 6, 10).blocks
    report = spectral_contraction(Unrolled(operator, torch.linalg.pinv(operator), torch.ones(1)))
    assert report.wide
    assert (report.lower >= 1 - 1e-6).all()
    assert "no weight can give less than 1" in str(report)


def brute_force_ratio(a):
    """The largest min a_i / b over all 2^(m n) sign patterns."""
    m, n = a.shape
    best = 0.0
    for signs in itertools.product((-1.0, 1.0), repeat=m * n):
        product = np.reshape(signs, (n, m)) @ a
        own, off = np.diag(product), np.abs(product - np.diag(np.diag(product)))
        best = max(best, own.min() / off.max()) if own.min() > 0 else best
    return best


def sparsity_below(ratio, columns):
    return max((s for s in range(1, columns + 1) if 2 * s - 1 < ratio), default=0)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (2, 5)])
@pytest.mark.parametrize("seed", range(6))
def test_existence_against_every_sign_pattern(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    a = (seed % 3) * torch.eye(*shape).double() + torch.randn(*shape, generator=generator).double()
    result = one_bit_existence(a)
    assert result.exhaustive
    ratio = brute_force_ratio(a.numpy())
    gain = result.signs @ a
    assert gain.diagonal().min() / (gain - gain.diagonal().diag()).abs().max() == pytest.approx(ratio)
    assert result.best_sparsity == sparsity_below(ratio, shape[1])
    assert result.adjoint_sparsity <= result.best_sparsity <= result.impossible_above
    constants = layer_constants(Unrolled(a[None], result.signs[None], torch.tensor([result.scale])))
    s = max(result.best_sparsity, 1)
    rate = constants.diagonal + (2 * s - 1) * constants.coherence
    assert rate.item() == pytest.approx(result.rate)
    assert (result.rate < 1) == (result.best_sparsity > 0)


def test_the_bounds_on_s_for_a_simplex():
    """n unit vectors in n - 1 dimensions with A_i · A_j = -1/(n - 1): W = Aᵀ attains the bound for float weights."""
    n = 41
    a = np.linalg.svd(np.eye(n) - 1 / n)[2][: n - 1] * np.sqrt(n / (n - 1))
    a = np.linalg.qr(np.random.default_rng(0).standard_normal((n - 1, n - 1)))[0] @ a  # no column along an axis
    np.testing.assert_allclose(a.T @ a, np.where(np.eye(n) > 0, 1.0, -1 / (n - 1)), atol=1e-12)
    result = one_bit_existence(torch.from_numpy(a), sweeps=1)
    attained = layer_constants(Unrolled(torch.from_numpy(a)[None], torch.from_numpy(a.T)[None], torch.ones(1)))
    assert result.float_impossible_above == attained.largest_sparsity.item() == 20
    lengths = np.abs(a).sum(0)  # A Aᵀ = n / (n - 1) times the identity, so that L m = n
    signs = np.where(lengths**2 < n, lengths * np.sqrt((n - 1) / np.maximum(n - lengths**2, 1e-12)), np.inf)
    assert result.impossible_above == sparsity_below(signs.min(), n) < 20


def test_no_float_weight_contracts_above_the_bound():
    """Gradient descent on the cross-correlations, with the diagonal of G fixed to one, does not get below the bound."""
    a = GaussianBlocks(1, 12, 20, seed=2).blocks[0].double()
    bound = one_bit_existence(a).float_impossible_above
    weights = torch.linalg.pinv(a).requires_grad_()
    optimizer, least = torch.optim.Adam([weights], 1e-2), math.inf
    for _ in range(300):
        gain = weights @ a
        normalised = gain / gain.diagonal()[:, None]
        coherence = (normalised - torch.eye(20)).abs()
        least = min(least, coherence.max().item())
        optimizer.zero_grad()
        coherence.pow(16).sum().pow(1 / 16).backward()
        optimizer.step()
    assert 0 < math.ceil((1 + 1 / least) / 2) - 1 <= bound < 20


@pytest.mark.parametrize("rows", [8, 64, 1024])
def test_existence_found_by_flips_is_a_contraction(rows):
    result = one_bit_existence(SignBlocks(1, rows, 12, seed=3).blocks[0])
    assert result.adjoint_sparsity <= result.best_sparsity <= result.impossible_above
    if rows == 1024:
        assert result.best_sparsity >= 3
        assert result.rate < 1


def test_no_sign_pattern_contracts_where_none_does():
    result = one_bit_existence(BlockOperator(torch.tensor([[[1.0, 0.2], [0.2, 1.0]]])).blocks[0])
    assert result.exhaustive
    assert result.best_sparsity == 0
    assert result.rate >= 1


@pytest.mark.parametrize("ensemble", ["gaussian", "sphere", "sign"])
@pytest.mark.parametrize("rows", [4, 32])
def test_moments_of_the_sign_adjoint_by_simulation(ensemble, rows):
    columns, draws = 16, 2000
    a = torch.randn(draws, rows, columns, dtype=torch.float64)
    if ensemble == "sphere":
        a = a / a.norm(dim=1, keepdim=True)
    a = a.sign() / rows**0.5 if ensemble == "sign" else a / (1.0 if ensemble == "sphere" else rows**0.5)
    gain = a.sign().mT @ a
    moments = sign_adjoint_moments(ensemble, rows, columns)
    diagonal = gain.diagonal(dim1=1, dim2=2)
    off = gain[:, ~torch.eye(columns, dtype=torch.bool)]
    assert diagonal.mean() == pytest.approx(moments.diagonal_mean, abs=0.02)
    assert diagonal.var() == pytest.approx(moments.diagonal_variance, abs=0.02)
    assert off.mean() == pytest.approx(0, abs=0.02)
    assert off.var() == pytest.approx(moments.off_diagonal_variance, abs=0.02)
    assert 0.5 * moments.largest_off_diagonal < off.abs().amax(1).mean() <= moments.largest_off_diagonal
