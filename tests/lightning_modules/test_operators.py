"""Physics operators: the adjoint identity, independent matrices, and what generated operators promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.operators import (
    BlockOperator,
    CircularConvolution,
    DenseOperator,
    FlattenedPhysics,
    GaussianBlocks,
    SignBlocks,
    SparseSigns,
    SubsampledDCT,
    SubsampledHadamard,
    operator_blocks,
    spectral_norm,
)
from pibinn_plugin import Dense, Mask, structure_from_operator

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**31)
untimed = settings(deadline=None)


class Blur:
    """Image-shaped physics in deepinv's manner: methods on images, no ``shape``; it drops the last column."""

    def A(self, image):
        return (image + image.roll(1, -2))[..., :-1]

    def A_adjoint(self, measured):
        image = torch.nn.functional.pad(measured, (0, 1))
        return image + image.roll(-1, -2)


OPERATORS = {
    "blocks": lambda seed: GaussianBlocks(3, 4, 6, seed),
    "dense": lambda seed: DenseOperator(torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))),
    "sparse": lambda seed: SparseSigns(7, 12, 3, seed),
    "hadamard": lambda seed: SubsampledHadamard(5, 16, seed),
    "dct, even": lambda seed: SubsampledDCT(5, 12, seed),
    "dct, odd": lambda seed: SubsampledDCT(4, 9, seed),
    "signal": lambda seed: CircularConvolution(
        torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), [7]
    ),
    "image": lambda seed: CircularConvolution(
        torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), [6, 5]
    ),
    "physics": lambda seed: FlattenedPhysics(Blur(), (2, 4, 3)),
}
all_operators = pytest.mark.parametrize("kind", OPERATORS)


def dense_matrix(operator):
    """A by its products with the unit vectors, in float64."""
    return operator.A(torch.eye(operator.shape[1], dtype=torch.float64)).T


@all_operators
@untimed
@given(seed=seeds)
def test_adjoint_identity_and_linearity(kind, seed):
    operator = OPERATORS[kind](seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    rows, columns = operator.shape
    x, other = torch.randn(2, 3, columns, generator=generator, dtype=torch.float64)
    y = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    assert operator.A(x).shape == y.shape
    torch.testing.assert_close((operator.A(x) * y).sum(), (x * operator.A_adjoint(y)).sum())
    torch.testing.assert_close(operator.A(2 * x - other), 2 * operator.A(x) - operator.A(other))
    torch.testing.assert_close(operator.A(x)[0], operator.A(x[0]))  # a batch is its samples


@untimed
@given(sizes, sizes, sizes, seeds)
def test_blocks_are_a_block_diagonal_matrix(blocks, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(blocks, rows, columns, generator=generator, dtype=torch.float64)
    operator = BlockOperator(entries)
    dense = torch.block_diag(*entries)
    assert operator.shape == tuple(dense.shape)
    torch.testing.assert_close(dense_matrix(operator), dense)


@pytest.mark.parametrize("columns", [1, 2, 5, 12])
def test_dct_is_the_textbook_matrix(columns):
    j, k = np.arange(columns), np.arange(columns)[:, None]
    matrix = math.sqrt(2 / columns) * np.cos(np.pi * k * (2 * j + 1) / (2 * columns))
    matrix[0] /= math.sqrt(2)
    operator = SubsampledDCT(columns, columns)
    np.testing.assert_allclose(dense_matrix(operator), matrix, atol=1e-12)
    drawn = SubsampledDCT(min(3, columns), columns, seed=4)
    np.testing.assert_allclose(dense_matrix(drawn), matrix[drawn.row_index.numpy()], atol=1e-12)


def test_hadamard_is_sylvesters_matrix():
    matrix = np.ones((1, 1))
    for _ in range(4):
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    operator = SubsampledHadamard(6, 16, seed=2)
    np.testing.assert_allclose(dense_matrix(operator), matrix[operator.row_index.numpy()] / math.sqrt(6), atol=1e-12)


@pytest.mark.parametrize("size", [(7,), (5, 6)])
def test_convolution_is_a_sum_over_shifts(size):
    kernel = torch.randn([3, 5][-len(size) :], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.zeros(size, dtype=torch.float64)
    for index in np.ndindex(*kernel.shape):
        shift = [i - length // 2 for i, length in zip(index, kernel.shape, strict=True)]
        expected += kernel[index] * x.roll(shift, list(range(len(size))))
    operator = CircularConvolution(kernel, size)
    torch.testing.assert_close(operator.A(x.flatten()), expected.flatten())


def test_the_matrix_of_sparse_signs_gives_its_products_and_its_structure():
    operator = SparseSigns(16, 24, 3, seed=5).double()
    matrix = operator.matrix().to_dense()
    torch.testing.assert_close(dense_matrix(operator), matrix)
    assert (matrix != 0).sum(0).tolist() == [3] * 24
    torch.testing.assert_close(matrix.abs().unique(), torch.tensor([0, 3**-0.5]).double())
    assert structure_from_operator(operator.matrix()) == Mask(matrix)


def test_physics_on_images_is_flattened():
    operator = FlattenedPhysics(Blur(), (2, 4, 3))
    assert operator.shape == (2 * 4 * 2, 2 * 4 * 3)
    images = torch.randn(5, 2, 4, 3)
    assert torch.equal(operator.A(images.flatten(1)), Blur().A(images).flatten(1))


@pytest.mark.parametrize("kind", [GaussianBlocks, SignBlocks])
def test_generated_blocks_have_unit_columns(kind):
    torch.testing.assert_close(kind(4, 8, 16, seed=3).blocks.norm(dim=1), torch.ones(4, 16))


def test_sign_blocks_have_one_magnitude():
    assert SignBlocks(2, 4, 8).blocks.abs().unique().tolist() == [0.5]


@pytest.mark.parametrize(
    "generate",
    [
        lambda seed: GaussianBlocks(2, 4, 8, seed),
        lambda seed: SignBlocks(2, 4, 8, seed),
        lambda seed: SparseSigns(8, 16, 3, seed),
        lambda seed: SubsampledHadamard(8, 64, seed),
        lambda seed: SubsampledDCT(8, 64, seed),
    ],
)
def test_entries_come_from_the_seed_and_stay_out_of_the_state_dict(generate):
    first, second = generate(3), generate(4)
    assert torch.equal(dense_matrix(first.double()), dense_matrix(generate(3).double()))
    assert not torch.equal(dense_matrix(first), dense_matrix(second.double()))
    assert first.state_dict() == {}


@all_operators
def test_operators_move_and_compile(kind):
    torch.compiler.reset()
    operator = OPERATORS[kind](0).to(torch.float32)
    x = torch.randn(2, operator.shape[1])
    round_trip = torch.compile(lambda x: operator.A_adjoint(operator.A(x)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(round_trip(x), operator.A_adjoint(operator.A(x)))
    assert operator.to("meta").A(x.to("meta")).shape == (2, operator.shape[0])


@all_operators
def test_blocks_and_norm_of_any_operator(kind):
    operator = OPERATORS[kind](7).float()
    dense = torch.block_diag(*operator_blocks(operator))
    torch.testing.assert_close(dense, dense_matrix(OPERATORS[kind](7).double()).float())
    torch.testing.assert_close(spectral_norm(operator), float(torch.linalg.matrix_norm(dense, 2)), rtol=1e-5, atol=0)


def test_the_norm_of_a_large_operator_needs_no_matrix():
    operator = SparseSigns(250, 500, 6, seed=1)
    exact = float(torch.linalg.matrix_norm(operator.matrix().to_dense().double(), 2))
    assert spectral_norm(operator) == pytest.approx(exact, rel=1e-5)


def test_a_dense_operator_has_no_structural_zero():
    assert structure_from_operator(GaussianBlocks(1, 3, 5)) == Dense()


@all_operators
def test_sizes_that_do_not_fit_are_refused(kind):
    operator = OPERATORS[kind](0)
    rows, columns = operator.shape
    with pytest.raises(ValueError, match=rf"x has shape \(2, {columns + 1}\); expected {columns}"):
        operator.A(torch.zeros(2, columns + 1))
    with pytest.raises(ValueError, match=rf"y has shape \({rows + 1},\); expected {rows}"):
        operator.A_adjoint(torch.zeros(rows + 1))


class ShortAdjoint(Blur):
    def A_adjoint(self, measured):
        return measured


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockOperator(torch.ones(2, 3)), "finite blocks"),
        (lambda: BlockOperator(torch.full((1, 2, 2), math.nan)), "finite blocks"),
        (lambda: BlockOperator(torch.ones(1, 2, 2, dtype=torch.complex64)), "finite blocks .* got torch.complex64"),
        (lambda: DenseOperator(torch.eye(2, dtype=torch.int64)), "of real numbers; got torch.int64"),
        (lambda: CircularConvolution(torch.tensor([1j, 1j, 0]), [8]), "real, finite kernel"),
        (lambda: DenseOperator(torch.ones(2)), r"expected a matrix .* shape \(2,\)"),
        (lambda: SparseSigns(4, 8, 5), "nonzeros=5"),
        (lambda: SubsampledDCT(9, 8), "rows=9, columns=8"),
        (lambda: SubsampledHadamard(4, 12), "columns=12"),
        (lambda: CircularConvolution([1.0, 2.0], [8]), r"shape \(2,\)"),
        (lambda: CircularConvolution([1.0, 2.0, 1.0], [2]), r"size \(2,\)"),
        (lambda: CircularConvolution([1.0, math.inf, 1.0], [4]), "finite"),
        (lambda: FlattenedPhysics(torch.nn.Identity(), (3,)), "methods A and A_adjoint; got Identity"),
        (lambda: FlattenedPhysics(ShortAdjoint(), (1, 4, 4)), r"gave shape \(1, 1, 4, 3\); expected \(1, 1, 4, 4\)"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
