"""`structure_from_operator` against the support of matrices whose structure is known by construction."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pibinn_plugin import StructureError
from pibinn_plugin.structure import (
    Banded,
    BlockDiagonal,
    Dense,
    Mask,
    SmallEntriesWarning,
    structure_from_operator,
)
from pibinn_plugin.structure.operator_support import operator_support

EPS = torch.finfo(torch.float32).eps
rounding = pytest.mark.filterwarnings("ignore::pibinn_plugin.structure.SmallEntriesWarning")


class MatrixFree:
    """An operator that only shows what it does to a batch."""

    def __init__(self, matrix):
        self.matrix = matrix

    def A(self, x):
        return x @ self.matrix.T

    def A_adjoint(self, y):
        return y @ self.matrix


class Fourier:
    """A circulant matrix by FFT, in the precision of its input: every entry but those of the kernel is rounding."""

    def __init__(self, kernel, size):
        padded = torch.zeros(size, dtype=kernel.dtype)
        padded[: len(kernel)] = kernel
        self.padded, self.shape = padded, (size, size)

    def A(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(self.padded), n=len(self.padded))


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


def candidates(matrix):
    """Every structure that is exactly the support of a matrix, by trying each kind."""
    flags, (rows, columns) = matrix != 0, matrix.shape
    found = [Mask(flags)]
    if flags.all():
        found.append(Dense())
    for lower in range(rows):
        for upper in range(columns):
            if torch.equal(Banded(lower, upper).mask((rows, columns)), flags):
                found.append(Banded(lower, upper))
    groups = [(sorted(i for side, i in c if side == "row"), sorted(j for side, j in c if side == "column"))
              for c in components(matrix.numpy())]  # fmt: skip
    groups.sort(key=lambda group: (not group[0], group[0] or group[1]))
    sizes = {"rows": [len(r) for r, _ in groups], "columns": [len(c) for _, c in groups]}
    orders = {"row_order": [i for r, _ in groups for i in r], "column_order": [j for _, c in groups for j in c]}
    for blocks in (BlockDiagonal(**sizes), BlockDiagonal(**sizes, **orders)):
        if torch.equal(blocks.mask((rows, columns)), flags):
            found.append(blocks)
    return found


@st.composite
def supports(draw, largest=7):
    """Random, banded or block-diagonal, with rows and columns of zeros in any place, permuted or not."""
    kind = draw(st.sampled_from(["random", "band", "blocks"]))
    if kind == "blocks":
        sizes = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
        flags = torch.block_diag(*[torch.ones(size) for size in sizes]) != 0
    else:
        rows, columns = draw(st.integers(1, largest)), draw(st.integers(1, largest))
        flags = torch.ones(rows, columns, dtype=torch.bool)
        if kind == "band":
            flags = flags.triu(-draw(st.integers(0, rows))).tril(draw(st.integers(0, columns)))
        else:
            drawn = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
            flags = torch.tensor(drawn).reshape(rows, columns)
    rows, columns = flags.shape
    if draw(st.booleans()) and rows and columns:
        flags[draw(st.lists(st.integers(0, rows - 1), max_size=3))] = False
        flags[:, draw(st.lists(st.integers(0, columns - 1), max_size=3))] = False
    if draw(st.booleans()):
        flags = flags[list(draw(st.permutations(range(rows))))][:, list(draw(st.permutations(range(columns))))]
    if not flags.any():
        flags = torch.zeros(max(rows, 1), max(columns, 1), dtype=torch.bool)
        flags[draw(st.integers(0, max(rows, 1) - 1)), draw(st.integers(0, max(columns, 1) - 1))] = True
    return flags


def entries(shape, seed, dtype=torch.float64):
    """Magnitudes from 0.5 to 2, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    return (signs * (0.5 + 1.5 * torch.rand(shape, generator=generator))).to(dtype)


seeds = st.integers(0, 2**20)


# The structure of a support


@pytest.mark.filterwarnings("error::pibinn_plugin.structure.SmallEntriesWarning", "ignore:Sparse")
@given(supports(), seeds)
def test_the_structure_is_the_support(flags, seed):
    matrix = entries(flags.shape, seed) * flags
    structure = structure_from_operator(matrix)
    assert torch.equal(structure.mask(matrix.shape), flags)
    for same in (matrix.to_sparse_coo(), matrix.to_sparse_csr(), matrix.to_sparse_csc(), 1e-20 * matrix, flags):
        assert structure_from_operator(same) == structure
    assert structure_from_operator(MatrixFree(matrix), columns=matrix.shape[1]) == structure
    transposed = structure_from_operator(matrix.T)
    assert torch.equal(transposed.mask(flags.T.shape), structure.transposed().mask(flags.T.shape))


@given(supports(largest=5))
def test_no_candidate_takes_fewer_bytes(flags):
    structure = structure_from_operator(flags)
    assert len(structure.to_bytes()) <= min(len(candidate.to_bytes()) for candidate in candidates(flags.int()))


@rounding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(supports(), st.sampled_from([0.1, 1.0, 4.0]), seeds)
def test_noise_of_the_size_of_rounding_is_no_support(dtype, flags, size, seed):
    """Also in rows and columns of zeros, and where those cross."""
    matrix = entries(flags.shape, seed) * flags
    generator = torch.Generator().manual_seed(seed + 1)
    noise = size * torch.finfo(dtype).eps * (2 * torch.rand(flags.shape, generator=generator) - 1)
    noisy = (matrix + noise).to(dtype)
    expected = structure_from_operator(matrix)
    is_mostly_zero = int(flags.sum()) * 2 < flags.numel()
    if dtype != torch.bfloat16 or is_mostly_zero:
        assert structure_from_operator(noisy) == expected
        assert structure_from_operator(MatrixFree(noisy), columns=flags.shape[1]) == expected
        assert torch.equal(structure_from_operator(noisy.T).mask(flags.T.shape), flags.T)
    exact = (noisy * flags).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SmallEntriesWarning)
        assert structure_from_operator(exact) == expected


@given(supports())
def test_one_row_or_column_of_zeros_more_adds_no_nonzero(flags):
    before = structure_from_operator(flags).nnz(flags.shape)
    for axis in (0, 1):
        for place in range(flags.shape[axis] + 1):
            first, last = flags.split([place, flags.shape[axis] - place], axis)
            wider = torch.cat([first, torch.zeros_like(flags.narrow(axis, 0, 1)), last], axis)
            structure = structure_from_operator(wider)
            assert structure.nnz(wider.shape) == before
            assert torch.equal(structure.mask(wider.shape), wider)


def test_blocks_and_bands_in_few_bytes():
    assert structure_from_operator(torch.block_diag(*[torch.ones(2, 3)] * 4)) == BlockDiagonal(4)
    assert structure_from_operator(torch.ones(8, 8).triu(-2).tril(1)) == Banded(2, 1)
    assert structure_from_operator(torch.ones(3, 5)) == Dense()
    uneven = torch.block_diag(torch.ones(20, 30), torch.ones(31, 9))
    assert structure_from_operator(uneven) == BlockDiagonal(rows=(20, 31), columns=(30, 9))
    apart = torch.block_diag(torch.ones(20, 30), torch.zeros(2, 3), torch.ones(31, 9), torch.zeros(1, 0))
    assert structure_from_operator(apart) == BlockDiagonal(rows=(20, 2, 0, 31, 1), columns=(30, 0, 3, 9, 0))


@pytest.mark.parametrize("before", [(3, 0, 2, 0), (1, 0, 1, 0), (0, 0, 1, 0)])
def test_zeros_before_the_first_block_need_no_order(before):
    blocks = torch.block_diag(torch.ones(30, 20), torch.ones(20, 40), torch.ones(25, 30))
    matrix = F.pad(blocks, before)
    structure = structure_from_operator(matrix)
    assert isinstance(structure, BlockDiagonal)
    assert (structure.row_order, structure.column_order) == (None, None)
    assert torch.equal(structure.mask(matrix.shape), matrix != 0)


def test_permuted_blocks_where_they_take_fewer_bytes_than_a_mask():
    blocks = torch.block_diag(*[torch.ones(50, 60)] * 3)
    matrix = blocks[torch.randperm(150)][:, torch.randperm(180)]
    structure = structure_from_operator(matrix)
    assert isinstance(structure, BlockDiagonal) and structure.blocks == 3
    assert len(structure.to_bytes()) < len(Mask(matrix).to_bytes())
    inpainting = torch.diag((torch.rand(256) < 0.5).float())
    structure = structure_from_operator(inpainting)
    assert structure == Mask(inpainting)
    assert len(structure.to_bytes()) < 4 * 2 * 256  # the two orders of a permutation


def test_a_band_or_a_block_with_a_hole_is_the_mask_of_its_support():
    for whole in (torch.ones(8, 8).triu(-2).tril(1), torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))):
        whole[1, 1] = 0.0
        assert structure_from_operator(whole) == Mask(whole)


def test_long_chain_of_rows_is_one_component():
    """The component search goes by halving: a chain of thousands of links must be followed to its end."""
    chain = torch.eye(1500) + torch.diag(torch.ones(1499), 1)
    assert structure_from_operator(chain) == Banded(0, 1)
    order = torch.randperm(1500)
    assert isinstance(structure_from_operator(chain[order][:, torch.randperm(1500)]), Mask)


def test_a_huge_sparse_matrix_needs_no_dense_one():
    size = 2**17
    order = torch.randperm(size)
    permutation = torch.sparse_coo_tensor(
        torch.stack([order, torch.arange(size)]), torch.ones(size), (size, size), check_invariants=True
    )
    structure = structure_from_operator(permutation)  # 2^34 elements
    assert structure.nnz((size, size)) == size
    assert structure.row_order is not None


# Rounding


@rounding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [5, 7, 12, 16, 64, 100, 1000])
def test_a_blur_by_fft_has_the_support_of_its_kernel(size, dtype):
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=dtype)
    operator = Fourier(kernel, size)
    expected = torch.zeros(size, size, dtype=torch.bool)
    for shift in range(3):
        expected[(torch.arange(size) + shift) % size, torch.arange(size)] = True
    assert structure_from_operator(operator) == Mask(expected)
    assert structure_from_operator(operator.A(torch.eye(size, dtype=dtype))) == Mask(expected.T)
    assert structure_from_operator(operator, tolerance=0).nnz((size, size)) > 3 * size


@rounding
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_of_float32_is_known_in_another_dtype(dtype):
    """Random numbers on the diagonals of a matrix that was computed in float32 and stored otherwise."""
    matrix = torch.diag(torch.randn(64)) + torch.diag(torch.randn(60), 4) + 1e-7 * (torch.rand(64, 64) - 0.5)
    expected = torch.eye(64, dtype=torch.bool) | torch.diag(torch.ones(60, dtype=torch.bool), 4)
    assert torch.equal(structure_from_operator(matrix.to(dtype)).mask((64, 64)), expected)


@rounding
def test_a_column_of_rounding_alone_is_linked_by_its_smallest_entry():
    noisy = torch.tensor([[7.7e-4, 6.2e-4], [3.3e-4, 7.4e-4], [4.4e-5, 1.3]], dtype=torch.bfloat16)
    expected = torch.tensor([[False, False], [False, False], [False, True]])
    assert torch.equal(structure_from_operator(noisy).mask((3, 2)), expected)
    assert torch.equal(structure_from_operator(noisy.T).mask((2, 3)), expected.T)


@rounding
def test_identity_by_an_orthogonal_matrix_and_its_adjoint():
    orthogonal = torch.linalg.qr(torch.randn(200, 200)).Q
    assert structure_from_operator(orthogonal.T @ orthogonal) == BlockDiagonal(200)


def test_what_is_taken_for_rounding_is_reported():
    matrix = torch.eye(4) + 1e-8 * torch.ones(4, 4)
    matrix[0, 1], matrix[2, 2] = 3e-8, 0.5
    with pytest.warns(
        SmallEntriesWarning, match=r"12 of the 16 .* up to 3e-08; the smallest that is kept is 0\.5"
    ) as all:
        structure_from_operator(matrix)
    report = all[0].message.support
    assert (report.dropped, report.smallest_kept) == (12, 0.5)
    assert report.largest_dropped == pytest.approx(3e-8)
    assert all[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "matrix",
    [
        torch.diag(torch.logspace(0, -30, 31)),  # rows in units of their own
        torch.block_diag(torch.ones(3, 3), 1e-12 * torch.ones(2, 2)),
        torch.diag(torch.logspace(0, -12, 13, dtype=torch.float64)),
        torch.diag(torch.logspace(0, -12, 13, dtype=torch.float64)).to(torch.bfloat16),
        # In so coarse a dtype a twentieth of the largest entry is as small as rounding, but rounding fills.
        (torch.eye(30) + 0.05 * torch.ones(30, 30).tril(1).triu(-1)).to(torch.bfloat16),
        torch.eye(3, dtype=torch.int64) * 10**12 + 1,  # whole numbers are not rounded
        100 * torch.eye(4) + 0.5,
    ],
)
def test_small_entries_that_are_meant_are_kept(matrix):
    assert torch.equal(structure_from_operator(matrix).mask(matrix.shape), matrix != 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1000), (torch.bfloat16, 60), (torch.float16, 60)])
@pytest.mark.parametrize("seed", range(5))
def test_random_matrices_keep_their_smallest_entries(dtype, size, seed):
    """The smallest of many normal numbers is as small as rounding, and has many just above it."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert matrix.abs().min() < 8 * torch.finfo(dtype).eps * matrix.abs().max()
    assert torch.equal(structure_from_operator(matrix).mask(matrix.shape), matrix != 0)


def test_a_tolerance_that_is_given_is_relative_to_the_largest_entry():
    matrix = 100 * torch.eye(4) + 0.5
    assert structure_from_operator(matrix, tolerance=0.0049) == Dense()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert structure_from_operator(matrix, tolerance=0.01) == BlockDiagonal(4)
        assert structure_from_operator(MatrixFree(matrix), 4, tolerance=0.01) == BlockDiagonal(4)
    report = operator_support(matrix, tolerance=0.01)
    assert (report.dropped, report.largest_dropped, report.smallest_kept) == (12, 0.5, 100.5)
    noisy = torch.eye(4) + 1e-8
    assert structure_from_operator(noisy, tolerance=0) == Dense()


# Operators


def test_matrix_free_operator_larger_than_one_batch_of_probes():
    matrix = torch.block_diag(*[torch.rand(2, 3) + 0.1] * 200)  # 600 columns
    operator = MatrixFree(matrix)
    with pytest.raises(StructureError, match="columns="):
        structure_from_operator(operator)
    assert structure_from_operator(operator, columns=600) == BlockDiagonal(200)
    operator.shape = matrix.shape
    assert structure_from_operator(operator) == BlockDiagonal(200)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_operator_is_probed_in_its_own_dtype(dtype):
    matrix = torch.block_diag(torch.ones(2, 3), torch.ones(2, 3)).to(dtype)
    layer = nn.Linear(6, 4, bias=False).to(dtype)
    layer.weight.data.copy_(matrix)
    layer.A = layer.forward
    for operator in (MatrixFree(matrix), layer):
        assert structure_from_operator(operator, columns=6) == BlockDiagonal(2)
    assert not layer.weight.grad


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_operators_of_one_row_or_column(shape):
    assert structure_from_operator(torch.ones(shape)) == Dense()
    for place in range(max(shape) if max(shape) > 1 else 0):
        matrix = torch.ones(shape)
        matrix.view(-1)[place] = 0
        for operator in (matrix, MatrixFree(matrix)):
            assert torch.equal(structure_from_operator(operator, columns=shape[1]).mask(shape), matrix != 0)


def test_operator_on_another_dtype():
    for dtype in (torch.float64, torch.bool, torch.int64, torch.uint8, torch.bfloat16):
        assert structure_from_operator(torch.eye(4, dtype=dtype)) == BlockDiagonal(4)
