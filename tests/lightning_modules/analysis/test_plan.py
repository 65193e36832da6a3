"""Planned numbers of examples bring the bound within the gap, and one less does not."""

import pytest
import torch

from lightning_modules.analysis.code_length import CodeLengths
from lightning_modules.analysis.kl_bound import code_bound
from lightning_modules.analysis.plan import FAILURE, Plan


@pytest.mark.parametrize("gap", [0.05, 0.3])
@pytest.mark.parametrize("blocks", [1, 8])
def test_planned_examples_are_enough_and_one_less_is_not(gap, blocks):
    lengths = CodeLengths(nonzeros=500, rows=20, floats=3)
    counts = Plan(lengths, gap, blocks).counts()
    for scheme, bits in lengths.bits().items():
        for loss, count in zip((0.0, 0.01, 0.05, 0.1, 0.25), counts[scheme], strict=True):
            losses = torch.full((blocks,), loss, dtype=torch.float64)
            assert code_bound(losses, bits, count, FAILURE) <= loss + gap + 1e-9
            assert code_bound(losses, bits, count - 1, FAILURE) > loss + gap - 1e-9
    assert counts["one-bit, 0% flips"][0] < counts["one-bit, 5% flips"][0] < counts["one-bit"][0] < counts["float"][0]


def test_a_gap_that_no_loss_allows_has_no_number():
    plan = Plan(CodeLengths(10, 1, 1), 0.8)
    assert plan.counts()["one-bit"][-1] is None
    assert "none" in str(plan)
    assert max(map(len, str(plan).splitlines())) <= 120
