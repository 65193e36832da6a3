"""How many pairs determine signs: against linear programs on random inputs, and where the start from pairs warns."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.initialization import SignsFromPairs
from pibinn_plugin.initialization.sign_recovery import pairs_for_signs, signs_determined


def determined(inputs, signs):
    """Whether no other point of the box has the same outputs: no v in the null space with s_j v_j <= 0 but zero."""
    scaled = inputs * signs  # of v_j = -s_j w_j with w_j >= 0
    found = linprog(-np.ones(len(signs)), A_eq=scaled, b_eq=np.zeros(len(scaled)), bounds=(0, 1), method="highs")
    return found.fun > -1e-7


@pytest.mark.parametrize(("pairs", "unknowns"), [(2, 4), (3, 5), (5, 8), (4, 9)])
def test_the_probability_against_linear_programs(pairs, unknowns):
    random = np.random.default_rng(0)
    draws = 600
    found = np.mean(
        [
            determined(random.standard_normal((pairs, unknowns)), random.choice([-1.0, 1.0], unknowns))
            for _ in range(draws)
        ]
    )
    expected = signs_determined(pairs, unknowns)
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


@given(st.integers(1, 300), st.floats(0.01, 0.9999))
def test_the_fewest_pairs_are_enough_and_one_less_is_not(unknowns, probability):
    pairs = pairs_for_signs(unknowns, probability)
    assert signs_determined(pairs, unknowns) >= probability
    assert pairs == 0 or signs_determined(pairs - 1, unknowns) < probability
    assert signs_determined(unknowns, unknowns) == 1


@pytest.mark.parametrize(("pairs", "warned"), [(pairs_for_signs(24) - 1, True), (pairs_for_signs(24), False)])
def test_the_start_warns_of_too_few_pairs_for_the_rows_of_its_structure(pairs, warned):
    model = pb.prepare(nn.Linear(48, 4, bias=False), {"weight": pb.BlockDiagonal(2)})
    inputs = torch.randn(pairs, 48)
    batch = (inputs @ torch.block_diag(torch.ones(2, 24), -torch.ones(2, 24)).T, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SignsFromPairs()(model, [batch])
    messages = [str(each.message) for each in caught if "unknown signs" in str(each.message)]
    assert len(messages) == warned
    if warned:
        assert messages[0].startswith(f"{pairs} pairs for rows of 24 unknown signs")
        assert f"{pairs + 1} pairs do so in 99 of 100 rows" in messages[0]
