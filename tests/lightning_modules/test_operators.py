"""Physics operators: the adjoint identity, and what generated operators promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.operators import BlockOperator, GaussianBlocks, SignBlocks

sizes = st.integers(1, 5)


@given(sizes, sizes, sizes, st.integers(0, 2**31))
def test_adjoint_identity_and_dense_reference(blocks, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(blocks, rows, columns, generator=generator, dtype=torch.float64)
    operator = BlockOperator(entries)
    x = torch.randn(3, blocks * columns, generator=generator, dtype=torch.float64)
    y = torch.randn(3, blocks * rows, generator=generator, dtype=torch.float64)
    dense = torch.block_diag(*entries)
    assert operator.shape == tuple(dense.shape)
    torch.testing.assert_close(operator.A(x), x @ dense.T)
    torch.testing.assert_close(operator.A_adjoint(y), y @ dense)
    torch.testing.assert_close((operator.A(x) * y).sum(), (x * operator.A_adjoint(y)).sum())


@pytest.mark.parametrize("kind", [GaussianBlocks, SignBlocks])
def test_generated_operators_have_unit_columns_and_come_from_their_seed(kind):
    operator = kind(4, 8, 16, seed=3)
    torch.testing.assert_close(operator.blocks.norm(dim=1), torch.ones(4, 16))
    assert torch.equal(operator.blocks, kind(4, 8, 16, seed=3).blocks)
    assert not torch.equal(operator.blocks, kind(4, 8, 16, seed=4).blocks)


def test_sign_blocks_have_one_magnitude():
    assert SignBlocks(2, 4, 8).blocks.abs().unique().tolist() == [0.5]


def test_entries_stay_out_of_the_state_dict():
    assert GaussianBlocks(2, 4, 8).state_dict() == {}


@pytest.mark.parametrize("blocks", [torch.ones(2, 3), torch.full((1, 2, 2), float("nan"))])
def test_bad_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="finite blocks"):
        BlockOperator(blocks)
