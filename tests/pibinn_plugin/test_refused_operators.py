"""What `structure_from_operator` refuses: what is no matrix, not linear, or contradicts what it is said to be."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pibinn_plugin import StructureError
from pibinn_plugin.structure import BlockDiagonal, structure_from_operator


def operator_of(A, shape=(3, 3)):
    return SimpleNamespace(A=A, A_adjoint=lambda y: y @ torch.eye(3), shape=shape)


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (torch.zeros(3, 3), "no structure"),
        (torch.zeros(0, 3), "matrix with entries"),
        (torch.zeros(3, 0), "matrix with entries"),
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.tensor([[1.0, float("inf")]]), "infinite"),
        (torch.ones(3), "matrix"),
        (torch.ones(2, 3, 3), "matrix"),
        (torch.eye(4, dtype=torch.complex64), "complex64, and weights are real"),
        ("operator", "str"),
        (np.eye(3), "ndarray"),
        (operator_of(lambda x: x + 1), "not linear"),
        (operator_of(lambda x: x * 1j), "complex"),
        (operator_of(lambda x: x / x), "not linear"),  # NaN
        (operator_of(lambda x: x * float("inf") if x.any() else x), "infinite"),
        (operator_of(lambda x: x[:, :2]), r"shape \(1, 2\); expected one row of 3 measurements"),
        (operator_of(lambda x: x.T), r"shape \(3, 1\); expected one row"),
        (operator_of(lambda x: x, (3, 0)), "0 unknowns"),
        (operator_of(lambda x: x, (1, 3, 3)), "pass columns="),
    ],
)
def test_what_has_no_structure_is_refused(operator, words):
    with pytest.raises(StructureError, match=words):
        structure_from_operator(operator)


def test_columns_that_contradict_the_operator_are_refused():
    for operator in (torch.eye(3), operator_of(lambda x: x)):
        assert structure_from_operator(operator, columns=3) == BlockDiagonal(3)
        with pytest.raises(StructureError, match="columns=4"):
            structure_from_operator(operator, columns=4)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan"), float("inf")])
def test_a_tolerance_is_a_fraction(tolerance):
    with pytest.raises(StructureError, match="tolerance="):
        structure_from_operator(torch.eye(3), tolerance=tolerance)
