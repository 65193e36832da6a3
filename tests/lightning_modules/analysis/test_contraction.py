"""Spectral contraction and existence: against singular values, all sign patterns and a linear program."""

import itertools

import numpy as np
import pytest
import torch
from linear_program import smallest_rate

from lightning_modules.analysis.contraction import one_bit_existence, spectral_contraction
from lightning_modules.analysis.convergence import layer_constants
from lightning_modules.analysis.unrolled import Unrolled
from lightning_modules.operators import GaussianBlocks, SignBlocks


def contracts(a, weight, sparsity):
    """Whether this weight satisfies the condition of the certificates."""
    constants = layer_constants(Unrolled(torch.as_tensor(a)[None], torch.as_tensor(weight)[None], torch.ones(1)))
    return constants.largest_sparsity.item() >= sparsity


def test_spectral_contraction_is_the_largest_singular_value():
    operator = GaussianBlocks(2, 10, 6).blocks
    unrolled = Unrolled(operator, operator.mT + 0.1 * torch.randn(3, 2, 6, 10), torch.tensor([0.3, 0.5, 0.7]))
    for layer, (weight, step_size) in enumerate(zip(unrolled.weights, unrolled.step_sizes, strict=True)):
        dense = np.eye(6) - step_size.item() * (weight @ unrolled.operator).numpy()
        np.testing.assert_allclose(
            spectral_contraction(unrolled).norms[layer], np.linalg.svd(dense, compute_uv=False)[:, 0]
        )


def test_spectral_contraction_of_a_wide_operator_is_never_below_one():
    operator = GaussianBlocks(2, 6, 10).blocks
    report = spectral_contraction(Unrolled(operator, torch.linalg.pinv(operator), torch.ones(1)))
    assert report.wide
    assert (report.norms >= 1 - 1e-6).all()
    assert "no weight can give less than 1" in str(report)


def small_operator(seed, shape):
    """Gaussian or ±1, some of them nearly diagonal."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(*shape, generator=generator).double()
    a = a if seed % 2 else torch.where(a < 0, -1.0, 1.0)
    return a + (seed % 3) * torch.eye(*shape).double() * shape[0] / 2


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (2, 5)])
@pytest.mark.parametrize("seed", range(6))
def test_existence_against_every_sign_pattern_and_many_step_sizes(seed, shape):
    a = small_operator(seed, shape)
    result = one_bit_existence(a)
    m, n = shape
    scales = torch.logspace(-2, 1, 60, dtype=torch.float64)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=m * n)), dtype=torch.float64).view(-1, n, m)
    patterns = patterns[((patterns @ a).diagonal(dim1=1, dim2=2) > 0).all(-1)]  # no other contracts
    operators = a.expand(len(patterns), m, n)
    largest = 0
    for scale in scales:
        rates = layer_constants(Unrolled(operators, patterns, torch.tensor([scale]))).rates
        largest = max(largest, *((rates < 1 - 1e-9).sum(-1) - 1).flatten().tolist(), 0)
    # The grid of step sizes may miss the best: a lower bound of what all patterns reach.
    assert largest <= result.impossible_above <= result.float_impossible_above
    assert result.adjoint_sparsity <= result.best_sparsity <= result.impossible_above
    assert (result.best_sparsity >= 1) >= (largest >= 1)  # for s = 1 all are tried
    if result.best_sparsity:
        assert contracts(a, result.scale * result.signs, result.best_sparsity)


@pytest.mark.parametrize("seed", range(8))
def test_the_sparsity_and_rate_of_given_signs_against_a_search_over_step_sizes(seed):
    a = torch.eye(12, 8).double() * 8 + torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)).double()
    result = one_bit_existence(a)
    s = max(1, result.best_sparsity)

    def rates(scale, sparsity):
        unrolled = Unrolled(a[None], result.signs[None], torch.tensor([scale]))
        return layer_constants(unrolled).rates[0, 0, sparsity].item()

    scales = torch.logspace(-3, 1, 2000, dtype=torch.float64).tolist()
    assert result.best_sparsity >= 1
    assert rates(result.scale, s) == pytest.approx(result.rate)
    assert min(rates(scale, s) for scale in scales) >= result.rate - 1e-12
    if s < 8:
        assert min(rates(scale, s + 1) for scale in scales) >= 1


@pytest.mark.parametrize("shape", [(3, 4), (5, 6), (7, 8), (6, 9), (8, 10)])
@pytest.mark.parametrize("seed", range(10))
def test_no_float_weight_contracts_above_the_bound(seed, shape):
    """Among these are those of which (1 + ‖z‖₁) / 2, the bound of a coarser condition, is below what weights reach."""
    a = small_operator(seed, shape)
    reached = 0
    while reached < shape[1] and smallest_rate(a.numpy(), reached + 1) < 1 - 1e-7:
        reached += 1
    assert reached <= one_bit_existence(a).float_impossible_above


@pytest.mark.parametrize("seed", [13, 24, 31])
def test_operators_on_which_the_bound_of_the_coarser_condition_is_wrong(seed):
    a = torch.randn(7, 8, generator=torch.Generator().manual_seed(seed)).double()
    sizes = [np.abs(np.linalg.lstsq(np.delete(a.numpy(), i, 1), a[:, i].numpy())[0]).sum() for i in range(8)]
    assert (1 + min(sizes)) / 2 <= 2  # d + (2s - 1) μ < 1 is impossible for s = 2
    assert smallest_rate(a.numpy(), 2) < 1
    assert one_bit_existence(a).float_impossible_above >= 2


def test_the_bound_on_s_for_a_simplex():
    """n unit vectors in n - 1 dimensions with A_i · A_j = -1/(n - 1): ‖z‖₁ is n - 1 and the rank binds."""
    n = 9
    a = np.linalg.svd(np.eye(n) - 1 / n)[2][: n - 1] * np.sqrt(n / (n - 1))
    np.testing.assert_allclose(a.T @ a, np.where(np.eye(n) > 0, 1.0, -1 / (n - 1)), atol=1e-12)
    attained = layer_constants(Unrolled(torch.from_numpy(a)[None], torch.from_numpy(a.T)[None], torch.ones(1)))
    assert one_bit_existence(torch.from_numpy(a)).float_impossible_above == attained.largest_sparsity.item() == 4


@pytest.mark.parametrize("rows", [8, 64, 1024])
def test_existence_found_by_flips_is_a_contraction(rows):
    result = one_bit_existence(SignBlocks(1, rows, 12, seed=3).blocks[0])
    assert result.adjoint_sparsity <= result.best_sparsity <= result.impossible_above
    if rows == 1024:
        assert result.best_sparsity >= 3
        assert result.rate < 1


def test_no_sign_pattern_contracts_where_none_does():
    result = one_bit_existence(torch.tensor([[1.0, 0.2], [0.2, 1.0]]))
    assert result.best_sparsity == 0
    assert result.rate >= 1
