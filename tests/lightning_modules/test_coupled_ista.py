"""CoupledISTA against a textbook ISTA in numpy, and its structure."""

import numpy as np
import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.operators import BlockOperator, GaussianBlocks, SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA


def test_an_untrained_solver_is_ista():
    operator = GaussianBlocks(2, 6, 12, seed=1)
    solver = CoupledISTA(operator, layers=5)
    a = torch.block_diag(*operator.blocks).double().numpy()
    y = np.random.default_rng(0).standard_normal((4, 12))
    step, x = 1 / np.linalg.norm(a, 2) ** 2, np.zeros((4, 24))
    for _ in range(5):
        u = x + step * (y - x @ a.T) @ a
        x = np.sign(u) * np.maximum(np.abs(u) - 0.05, 0)
    np.testing.assert_allclose(solver(torch.from_numpy(y).float()).detach().numpy(), x, atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "structure"),
    [
        (SignBlocks(4, 2, 4), pb.BlockDiagonal(4)),
        (BlockOperator(torch.ones(1, 3, 3).tril().triu(-1)), pb.Banded(0, 1)),
    ],
)
def test_layers_have_the_structure_of_the_adjoint(operator, structure):
    layer = CoupledISTA(operator, layers=1).layers[0]
    assert layer.structure == structure
    assert layer.weight.numel() == structure.nnz((operator.shape[1], operator.shape[0]))


def test_a_dense_operator_gives_linear_layers():
    assert type(CoupledISTA(GaussianBlocks(1, 4, 8), layers=1).layers[0]) is torch.nn.Linear


def test_the_weights_of_a_sign_operator_lose_nothing_to_their_signs():
    solver = CoupledISTA(SignBlocks(2, 4, 8), layers=3)
    y = torch.randn(5, 8)
    expected = solver(y)
    torch.testing.assert_close(pb.prepare(solver, {"layers.*.weight": None})(y), expected)


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match="layers=0"):
        CoupledISTA(SignBlocks(2, 4, 8), layers=0)
    with pytest.raises(ValueError, match=r"\(5, 9\).*8 measurements"):
        CoupledISTA(SignBlocks(2, 4, 8), layers=1)(torch.zeros(5, 9))
