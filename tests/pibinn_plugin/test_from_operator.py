"""`structure_from_operator` against the support of matrices whose structure is known by construction."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pibinn_plugin import StructureError
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask, structure_from_operator


class MatrixFree:
    """An operator that only shows what it does to a batch."""

    def __init__(self, matrix):
        self.matrix = matrix

    def A(self, x):
        return x @ self.matrix.T

    def A_adjoint(self, y):
        return y @ self.matrix


def components(matrix):
    """The connected components of the bipartite graph of rows and columns, by depth-first search."""
    rows, columns = matrix.shape
    unseen, found = {("row", i) for i in range(rows)} | {("column", j) for j in range(columns)}, []
    while unseen:
        stack, component = [unseen.pop()], set()
        while stack:
            side, index = node = stack.pop()
            component.add(node)
            line = matrix[index] if side == "row" else matrix[:, index]
            other = "column" if side == "row" else "row"
            stack += (neighbours := {(other, int(k)) for k in np.flatnonzero(line)} & unseen)
            unseen -= neighbours
        found.append(component)
    return found


@st.composite
def block_matrices(draw):
    blocks = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
    matrix = torch.block_diag(*[torch.ones(size) for size in blocks])
    row_order, column_order = draw(st.permutations(range(len(matrix)))), draw(st.permutations(range(len(matrix.T))))
    return matrix[list(row_order)][:, list(column_order)] * draw(st.sampled_from([1.0, -0.3]))


@given(block_matrices())
def test_permuted_blocks_are_found_exactly(matrix):
    structure = structure_from_operator(matrix)
    assert torch.equal(structure.mask(matrix.shape), matrix != 0)
    if (matrix == 0).any():
        assert isinstance(structure, BlockDiagonal)
        assert structure.blocks == len(components(matrix.numpy()))
    else:
        assert structure == Dense()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_the_structure_covers_the_support_and_joins_only_connected_entries(rows, columns, data):
    flags = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    flags[data.draw(st.integers(0, rows * columns - 1))] = True
    matrix = torch.tensor(flags).reshape(rows, columns).float()
    structure = structure_from_operator(matrix)
    mask = structure.mask((rows, columns))
    assert mask[matrix != 0].all()
    if isinstance(structure, BlockDiagonal):
        expected = torch.zeros(rows, columns, dtype=torch.bool)
        for component in components(matrix.numpy()):
            for side, i in component:
                for other, j in component:
                    if (side, other) == ("row", "column"):
                        expected[i, j] = True
        assert torch.equal(mask, expected)
    elif isinstance(structure, Banded):
        assert 2 * int((matrix != 0).sum()) >= int(mask.sum())
    else:
        assert torch.equal(mask, matrix != 0)
    for same in (matrix.to_sparse_coo(), matrix.to_sparse_csr()):
        assert structure_from_operator(same) == structure
    assert structure_from_operator(MatrixFree(matrix), columns=columns) == structure


def test_ordered_blocks_need_no_permutation():
    assert structure_from_operator(torch.block_diag(*[torch.ones(2, 3)] * 4)) == BlockDiagonal(4)
    uneven = torch.block_diag(torch.ones(1, 2), torch.ones(2, 1))
    assert structure_from_operator(uneven) == BlockDiagonal(rows=(1, 2), columns=(2, 1))


def test_long_chain_of_rows_is_one_component():
    """The component search goes by halving: a chain of thousands of links must be followed to its end."""
    chain = torch.eye(1500) + torch.diag(torch.ones(1499), 1)
    assert structure_from_operator(chain) == Banded(0, 1)
    order = torch.randperm(1500)
    assert isinstance(structure_from_operator(chain[order][:, torch.randperm(1500)]), Mask)


def test_rows_and_columns_of_zeros_are_in_no_block():
    matrix = torch.zeros(4, 5)
    matrix[1, 2], matrix[3, 0] = 1.0, 2.0
    structure = structure_from_operator(matrix)
    assert torch.equal(structure.mask((4, 5)), matrix != 0)
    assert structure.nnz((4, 5)) == 2


def test_bands_are_found_also_with_holes():
    toeplitz = torch.ones(8, 8).triu(-2).tril(1)
    assert structure_from_operator(toeplitz) == Banded(2, 1)
    toeplitz[4, 3] = 0.0
    assert structure_from_operator(toeplitz) == Banded(2, 1)
    sparse = torch.eye(8)
    sparse[0, 7] = sparse[7, 0] = sparse[0, 1] = sparse[1, 2] = sparse[2, 3] = sparse[3, 4] = sparse[4, 5] = 1.0
    sparse[5, 6] = 1.0
    assert isinstance(structure_from_operator(sparse), Mask)


def test_matrix_free_operator_larger_than_one_batch_of_probes():
    matrix = torch.block_diag(*[torch.rand(2, 3) + 0.1] * 200)  # 600 columns
    operator = MatrixFree(matrix)
    with pytest.raises(StructureError, match="columns="):
        structure_from_operator(operator)
    assert structure_from_operator(operator, columns=600) == BlockDiagonal(200)
    operator.shape = matrix.shape
    assert structure_from_operator(operator) == BlockDiagonal(200)


def test_tolerance_is_relative_to_the_largest_entry():
    matrix = 100 * torch.eye(4) + 0.5
    assert structure_from_operator(matrix) == Dense()
    assert structure_from_operator(matrix, tolerance=0.01) == BlockDiagonal(4)


def test_adjoint_has_the_transposed_structure():
    matrix = torch.zeros(4, 6)
    matrix[[0, 1, 2, 3], [5, 0, 5, 2]] = 1.0
    structure = structure_from_operator(matrix)
    assert torch.equal(structure.transposed().mask((6, 4)), structure_from_operator(matrix.T).mask((6, 4)))


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (torch.zeros(3, 3), "no structure"),
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.tensor([[1.0, float("inf")]]), "infinite"),
        (torch.ones(3), "matrix"),
        (torch.ones(2, 3, 3), "matrix"),
        ("operator", "str"),
        (np.eye(3), "ndarray"),
    ],
)
def test_what_has_no_structure_is_refused(operator, words):
    with pytest.raises(StructureError, match=words):
        structure_from_operator(operator)


def test_operator_on_another_dtype():
    assert structure_from_operator(torch.eye(4, dtype=torch.float64)) == BlockDiagonal(4)
    assert structure_from_operator(torch.eye(4, dtype=torch.bool)) == BlockDiagonal(4)
    assert structure_from_operator(torch.eye(4, dtype=torch.int64)) == BlockDiagonal(4)
    assert structure_from_operator(torch.eye(4, dtype=torch.complex64)) == BlockDiagonal(4)
