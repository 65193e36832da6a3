"""Structures against masks drawn element by element, and what must hold of any structure."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from structure_cases import patterns, ruled_structures, structures
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pibinn_plugin import StructureError, prepare
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask, Structure, matrix_shape


def drawn_mask(structure, shape):
    """The pattern by its definition, one element at a time."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    mask = np.zeros((rows, columns), dtype=bool)
    if isinstance(structure, BlockDiagonal):
        heights = structure.rows or [rows // structure.blocks] * structure.blocks
        widths = structure.columns or [columns // structure.blocks] * structure.blocks
        row_order = structure.row_order or range(rows)
        column_order = structure.column_order or range(columns)
        block_of_row = np.repeat(np.arange(structure.blocks), heights)
        block_of_column = np.repeat(np.arange(structure.blocks), widths)
    for i in range(rows):
        for j in range(columns):
            if isinstance(structure, Dense):
                mask[i, j] = True
            elif isinstance(structure, Banded):
                mask[i, j] = -structure.lower <= j - i <= structure.upper
            else:
                mask[row_order[i], column_order[j]] = block_of_row[i] == block_of_column[j]
    return torch.from_numpy(mask).reshape(shape)


matrices = structures().filter(lambda case: len(case[1]) == 2)


@given(ruled_structures())
def test_mask_is_the_rule(case):
    structure, shape = case
    assert torch.equal(structure.mask(shape), drawn_mask(structure, shape))


@given(patterns())
def test_mask_structure_keeps_its_pattern_whatever_its_encoding(pattern):
    assert torch.equal(Mask(pattern).mask(pattern.shape), pattern)


@pytest.mark.parametrize(
    ("encoding", "pattern"),
    [
        ("bitmap", torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5),
        ("csr", torch.eye(300) != 0),
        ("bsr", torch.block_diag(*[torch.ones(16, 16)] * 32) != 0),
    ],
)
def test_mask_chooses_the_cheapest_encoding_and_reads_it_back(encoding, pattern):
    structure = Mask(pattern)
    assert structure.encoding == encoding
    assert len(structure.data) <= 9 + -(-pattern.numel() // 8)  # never above a bitmap
    assert torch.equal(Structure.from_bytes(structure.to_bytes()).mask(pattern.shape), pattern)


@given(structures())
def test_compact_form_counts_each_structural_nonzero_once(case):
    structure, shape = case
    positions = structure.positions(shape)
    assert positions.tolist() == list(dict.fromkeys(positions.tolist()))
    assert torch.equal(positions.sort().values, structure.mask(shape).flatten().nonzero().flatten())
    assert structure.nnz(shape) == int(np.prod(structure.compact_shape(shape))) == int(structure.mask(shape).sum())


@given(structures())
def test_compact_and_dense_are_inverse(case):
    structure, shape = case
    dense_weight = torch.randn(shape)
    compact = structure.to_compact(dense_weight)
    assert compact.shape == structure.compact_shape(shape)
    assert torch.equal(structure.to_dense(compact, shape), dense_weight * structure.mask(shape))
    assert torch.equal(structure.to_compact(structure.to_dense(compact, shape)), compact)
    assert torch.equal(compact.flatten(), dense_weight.flatten()[structure.positions(shape)])


@given(structures())
def test_bytes_and_json_round_trip(case):
    structure, _ = case
    for again in (
        Structure.from_bytes(structure.to_bytes()),
        Structure.from_json(structure.to_json()),
        pickle.loads(pickle.dumps(structure)),
        copy.deepcopy(structure),
    ):
        assert again == structure
        assert hash(again) == hash(structure)
        assert type(again) is type(structure)
    assert structure.metadata_bits == 8 * len(structure.to_bytes())
    json.loads(structure.to_json())


@given(matrices, st.sampled_from([(), (3,), (2, 3)]))
def test_linear_is_the_dense_product(case, batch):
    structure, shape = case
    weight = torch.randn(shape, dtype=torch.float64) * structure.mask(shape)
    compact = structure.to_compact(weight)
    input = torch.randn(*batch, shape[1], dtype=torch.float64)
    expected = (weight.numpy() @ input.numpy()[..., None])[..., 0]
    torch.testing.assert_close(structure.linear(input, compact, shape).numpy(), expected, rtol=1e-12, atol=1e-13)
    in_single = structure.linear(input.float(), compact.float(), shape)
    torch.testing.assert_close(in_single, torch.from_numpy(expected).float())
    signs = compact.sign().bfloat16()  # small integers: exact in bfloat16
    counts = torch.randint(-2, 3, (*batch, shape[1])).bfloat16()
    integers = (structure.to_dense(signs, shape).double() @ counts.double()[..., None])[..., 0]
    in_half = structure.linear(counts, signs, shape)
    assert in_half.dtype == torch.bfloat16
    assert torch.equal(in_half.double(), integers)


@pytest.mark.parametrize("blocks", [{"blocks": 1}, {"rows": (1, 2), "columns": (3, 1)}])
def test_orders_say_where_rows_and_columns_go(blocks):
    """Permutations that are not their own inverse."""
    structure = BlockDiagonal(**blocks, row_order=(1, 2, 0), column_order=(2, 0, 3, 1))
    weight = torch.randn(3, 4) * structure.mask((3, 4))
    input = torch.randn(5, 4)
    torch.testing.assert_close(structure.linear(input, structure.to_compact(weight), (3, 4)), input @ weight.T)


@st.composite
def sparse_patterns(draw):
    """Few nonzeros in a matrix for which sparse rows, or those of tiles, are the cheapest."""
    rows, columns = draw(st.tuples(st.integers(40, 90), st.integers(40, 90)))
    lines = draw(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=6).filter(any))
    pattern = torch.zeros(rows, columns, dtype=torch.bool)
    for row, places in enumerate(lines):
        pattern[row, places] = True
    height, width = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (3, 2)]))
    return pattern.repeat_interleave(height, 0).repeat_interleave(width, 1)


@given(sparse_patterns())
def test_sparse_masks_are_read_back_and_transposed(pattern):
    structure, shape = Mask(pattern), tuple(pattern.shape)
    assert structure.encoding != "bitmap"
    for again in (structure, Structure.from_bytes(structure.to_bytes()), structure.transposed().transposed()):
        assert again == structure
        assert torch.equal(again.positions(shape), pattern.flatten().nonzero().flatten())
    assert torch.equal(structure.transposed().mask(shape[::-1]), pattern.T)
    assert structure.transposed() == Mask(pattern.T)


@given(matrices)
def test_linear_of_the_transposed_structure_is_the_adjoint(case):
    structure, shape = case
    assert torch.equal(structure.transposed().mask(shape[::-1]), structure.mask(shape).T)
    assert structure.transposed().transposed().mask(shape).equal(structure.mask(shape))


def test_transposed_blocks_exchange_sizes_and_orders():
    orders = {"row_order": (2, 0, 1), "column_order": (3, 1, 0, 2)}
    exchanged = {"row_order": (3, 1, 0, 2), "column_order": (2, 0, 1)}
    uneven = BlockDiagonal(rows=(1, 2), columns=(3, 1), **orders)
    assert uneven.transposed() == BlockDiagonal(rows=(3, 1), columns=(1, 2), **exchanged)
    assert BlockDiagonal(1, **orders).transposed() == BlockDiagonal(1, **exchanged)
    square = BlockDiagonal(2, row_order=(0, 2, 1, 3), column_order=(0, 1, 2, 3))
    assert torch.equal(square.transposed().mask((4, 4)), square.mask((4, 4)).T)
    assert not torch.equal(square.mask((4, 4)), square.mask((4, 4)).T)


@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        (Dense(), (3, 4)),
        (Banded(1, 2), (4, 5)),
        (BlockDiagonal(2), (4, 6)),
        (BlockDiagonal(2, row_order=(3, 1, 0, 2), column_order=(1, 0, 3, 2)), (4, 4)),
        (BlockDiagonal(rows=(1, 3), columns=(2, 2)), (4, 4)),
        (Mask([[1, 0, 1], [0, 1, 0]]), (2, 3)),
    ],
)
def test_linear_differentiates(structure, shape):
    input = torch.randn(3, shape[1], dtype=torch.float64, requires_grad=True)
    compact = torch.randn(structure.compact_shape(shape), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: structure.linear(x, w, shape), (input, compact))
    assert torch.autograd.gradcheck(lambda w: structure.to_dense(w, shape), (compact,))


@pytest.mark.parametrize(
    "structure", [BlockDiagonal(2, row_order=(3, 1, 0, 2), column_order=(1, 0, 3, 2)), Mask(torch.eye(4))]
)
def test_training_after_a_first_call_in_inference_mode(structure):
    """Lightning validates once before it trains: what a structure caches then must not be an inference tensor."""
    structure = copy.deepcopy(structure)
    compact = torch.randn(structure.compact_shape((4, 4)), requires_grad=True)
    with torch.inference_mode():
        structure.linear(torch.ones(4), compact, (4, 4))
    structure.linear(torch.ones(4, requires_grad=True), compact, (4, 4)).sum().backward()
    assert torch.equal(compact.grad, torch.ones_like(compact))


@pytest.mark.parametrize("first", ["compile", "export", "fake", "inference", "meta"])
@pytest.mark.parametrize(
    "pattern", [torch.arange(64).reshape(8, 8) % 3 == 0, torch.eye(64), torch.block_diag(*[torch.ones(8, 8)] * 8)]
)
def test_a_mask_from_bytes_may_be_used_first_in_any_mode(first, pattern):
    """Its positions are made at first use: they must be real tensors that serve every later one."""
    structure, shape = Structure.from_bytes(Mask(pattern).to_bytes()), tuple(pattern.shape)
    compact = torch.randn(structure.compact_shape(shape))
    expected = torch.zeros(shape)
    expected[pattern != 0] = compact
    module = nn.Module()
    module.forward = lambda values: structure.to_dense(values, shape)
    if first == "compile":
        assert torch.equal(torch.compile(module.forward, fullgraph=True, backend="aot_eager")(compact), expected)
    elif first == "export":
        assert torch.equal(torch.export.export(module, (compact,)).module()(compact), expected)
    elif first == "fake":
        with FakeTensorMode() as mode:
            assert structure.to_dense(mode.from_tensor(compact), shape).shape == shape
    elif first == "inference":
        with torch.inference_mode():
            structure.to_dense(compact, shape)
    else:
        with torch.device("meta"):
            structure.positions(shape)
    compact.requires_grad_()
    dense = structure.to_dense(compact, shape)
    assert torch.equal(dense, expected)
    dense.sum().backward()
    assert torch.equal(compact.grad, torch.ones_like(compact))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dense(),
        lambda: Banded(1, 0),
        lambda: BlockDiagonal(2, row_order=(3, 1, 0, 2), column_order=(1, 0, 3, 2)),
        lambda: Mask([[1, 0, 0, 1]] * 4),
    ],
)
def test_rules_do_not_depend_on_the_default_device(make):
    expected = make()
    with torch.device("meta"):
        structure = make()
        model = prepare(nn.Linear(4, 4), {"weight": structure})
        assert structure.nnz((4, 4)) == expected.nnz((4, 4))
        assert structure.to_bytes() == expected.to_bytes()
    assert model.parametrizations.weight.original.device.type == "meta"
    assert torch.equal(structure.mask((4, 4), "cpu"), expected.mask((4, 4)))


def test_equal_blocks_have_one_spelling():
    assert BlockDiagonal(rows=(2, 2), columns=(3, 3)) == BlockDiagonal(2) == BlockDiagonal(blocks=2)
    assert BlockDiagonal(rows=[1, 2], columns=[2, 1]) == BlockDiagonal(rows=(1, 2), columns=(2, 1))


def test_structures_are_frozen_dictionary_keys():
    keys = {Dense(): 0, BlockDiagonal(8): 1, Banded(1, 1): 2, Mask(torch.eye(3)): 3}
    assert [keys[key] for key in (Dense(), BlockDiagonal(8), Banded(1, 1), Mask(torch.eye(3)))] == [0, 1, 2, 3]
    assert BlockDiagonal(8) != BlockDiagonal(4)
    assert Mask(torch.eye(3)) != Mask(torch.ones(3, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlockDiagonal(8).blocks = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        Mask(torch.eye(3)).data = b""


def test_convolution_weights_are_matrices_of_rows():
    assert matrix_shape((16, 4, 3, 3)) == (16, 36)
    mask = BlockDiagonal(2).mask((4, 6, 3, 3))  # groups: input and output channels of one block
    assert torch.equal(mask[:2, :3].all(), torch.tensor(True))
    assert not mask[:2, 3:].any()
    assert mask.sum() == 4 * 3 * 9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockDiagonal(0), "at least one block"),
        (lambda: BlockDiagonal(), "at least one block"),
        (lambda: BlockDiagonal(2.5), "whole number"),
        (lambda: BlockDiagonal(rows=(1, 2)), "together"),
        (lambda: BlockDiagonal(rows=(1, 2), columns=(1,)), "as many rows as columns"),
        (lambda: BlockDiagonal(rows=(1, -1), columns=(1, 1)), "none negative"),
        (lambda: BlockDiagonal(rows=(1, 0), columns=(0, 1)), "no weight"),
        (lambda: BlockDiagonal(3, rows=(1, 2), columns=(1, 2)), "describe 2 blocks"),
        (lambda: BlockDiagonal(2, row_order=(0, 0), column_order=(0, 1)), "once"),
        (lambda: Banded(-1, 0), "negative"),
        (lambda: Banded(0, -1), "negative"),
        (lambda: Banded(0.5, 0), "whole number"),
        (lambda: BlockDiagonal(True), "whole number"),
        (lambda: BlockDiagonal(2**32), "at most 4294967295; got 4294967296"),
        (lambda: BlockDiagonal(2**20000), "a number of 20001 bits"),
        (lambda: BlockDiagonal(rows=3, columns=3), "list of whole numbers; got 3"),
        (lambda: BlockDiagonal(rows="12", columns="12"), "list of whole numbers; got '12'"),
        (lambda: Mask(torch.zeros(2, 2)), "without a nonzero"),
        (lambda: Mask([]), "without a nonzero"),
        (lambda: Mask([[1, 0], [float("nan"), 0]]), "NaN"),
        (lambda: Mask([[1, 0], [1]]), "array of numbers"),
        (lambda: Mask("10"), "array of numbers; got '10'"),
        (lambda: Mask.from_positions(torch.tensor([5]), (2**16, 2**15 + 1)), "2147549184 elements"),
        (lambda: BlockDiagonal(8).check((16, 12)), "divisor"),
        (lambda: BlockDiagonal(2).check((4,)), "do not fit"),
        (lambda: BlockDiagonal(rows=(1, 2), columns=(1, 2)).check((4, 3)), "do not fit"),
        (lambda: BlockDiagonal(2, row_order=(1, 0), column_order=(1, 0)).check((4, 2)), "does not fit"),
        (lambda: Banded(3, 0).check((3, 4)), "lower < rows"),
        (lambda: Banded(0, 3).check((4, 3)), "upper < columns"),
        (lambda: Mask(torch.ones(4, 18)).check((4, 2, 3, 3)), "does not fit"),  # of as many elements
        (lambda: Dense().check((2**31, 2**31, 2)), "more than 2.62 elements"),
        (lambda: Dense().check((2**20000, 2)), "more than 2.62 elements"),
        (lambda: Banded(0, 0).check((3, 3, 3)), "matrix"),
        (lambda: Mask(torch.eye(3)).check((3, 4)), r"\(3, 3\)"),
        (lambda: Dense().check((0, 3)), "empty"),
    ],
)
def test_what_is_malformed_or_does_not_fit_is_refused(make, words):
    with pytest.raises(StructureError, match=words):
        make()


def test_products_are_written_as_functional_operations():
    """Under vmap an indexed assignment into a fresh tensor fails."""
    for structure in (Banded(1, 1), BlockDiagonal(2), BlockDiagonal(rows=(1, 3), columns=(3, 1)), Mask(torch.eye(4))):
        weights = torch.randn(5, *structure.compact_shape((4, 4)))
        input = torch.randn(4)
        products = torch.func.vmap(lambda w, s=structure, x=input: s.linear(x, w, (4, 4)))(weights)
        expected = [F.linear(input, structure.to_dense(w, (4, 4))) for w in weights]
        torch.testing.assert_close(products, torch.stack(expected))
