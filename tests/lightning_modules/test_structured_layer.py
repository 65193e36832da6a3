"""structured_layer: it is the matrix it starts at, in the structure of its support, and a target of None fits it."""

import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.operators import BlockOperator, CircularConvolution, GaussianBlocks, SparseSigns, operator_blocks
from lightning_modules.solvers.structured_layer import structured_layer

OPERATORS = {
    "blocks": (GaussianBlocks(3, 2, 4), pb.BlockDiagonal),
    "one block": (GaussianBlocks(1, 3, 5), None),
    "hidden blocks": (BlockOperator(torch.block_diag(torch.ones(6, 9), torch.ones(3, 6))[None]), pb.BlockDiagonal),
    "band": (BlockOperator(torch.ones(1, 4, 4).tril().triu(-1)), pb.Banded),
    "mask": (SparseSigns(6, 9, 2), pb.Mask),
    "circulant": (CircularConvolution([1.0, 2.0, 3.0], [8]), pb.Mask),
}
ROUNDING = pytest.mark.filterwarnings("ignore::pibinn_plugin.structure.SmallEntriesWarning")


def exact_adjoint(operator):
    """The blocks of the adjoint without the rounding of an FFT."""
    adjoint = operator_blocks(operator).mT
    return torch.where(adjoint.abs() < 1e-6, 0.0, adjoint)


@ROUNDING
@pytest.mark.parametrize("kind", OPERATORS)
def test_it_starts_as_the_matrix_and_keeps_its_structure(kind):
    operator, structure = OPERATORS[kind]
    adjoint = operator_blocks(operator).mT
    layer = structured_layer(adjoint)
    y = torch.randn(4, operator.shape[0])
    torch.testing.assert_close(layer(y), operator.A_adjoint(y))
    assert isinstance(getattr(layer, "structure", None), structure or type(None))
    assert layer.weight.is_contiguous()
    if len(adjoint) == 1:
        assert layer.weight.numel() == exact_adjoint(operator).count_nonzero()


@ROUNDING
@pytest.mark.parametrize("kind", OPERATORS)
def test_one_bit_weights_stay_inside_the_structure(kind):
    operator, _ = OPERATORS[kind]
    model = pb.prepare(torch.nn.Sequential(structured_layer(operator_blocks(operator).mT)), {"0.weight": None})
    y = torch.randn(4, operator.shape[0])
    signs = torch.block_diag(*exact_adjoint(operator)).sign() * pb.global_scale(model)()
    torch.testing.assert_close(model(y), y @ signs.T)
    torch.testing.assert_close(pb.convert(model)(y), y @ signs.T)


def test_layers_made_from_one_matrix_have_weights_of_their_own():
    blocks = torch.ones(2, 3, 4)
    first, second = structured_layer(blocks), structured_layer(blocks)
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.min() == blocks.min() == 1
