"""Weights against the physics: numpy references, invariances, and estimates held against exact values."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_modules.analysis.geometry import compare_geometry, network_geometry
from lightning_modules.analysis.variants import weight_variants
from pibinn_plugin import PIBiNNError, convert, global_scale, prepare
from pibinn_plugin.errors import ScaleError, StructureError
from pibinn_plugin.nn import BlockDiagonalLinear
from pibinn_plugin.structure import Banded, BlockDiagonal

SEEDS = st.integers(0, 10_000)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 8))


def draw(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def geometry(weight, operator, **options):
    return compare_geometry({"W": weight}, operator, samples=options.pop("samples", 20), **options).rows["W"]


def row_space(matrix):
    _, values, rows = np.linalg.svd(matrix, full_matrices=False)
    return rows[values > values[0] * 1e-12]


def test_against_numpy():
    W, A = draw((2, 3, 7), 1), draw((2, 3, 7), 2)
    found = geometry(W, A, sparsity=2, samples=2000)  # enough to draw each of the 21 pairs
    for block, (w, a) in enumerate(zip(W.numpy(), A.numpy(), strict=True)):
        cosine = np.trace(w.T @ a) / np.linalg.norm(w) / np.linalg.norm(a)
        np.testing.assert_allclose(found.alignment[block], cosine)
        values = np.linalg.svd(w, compute_uv=False)
        np.testing.assert_allclose(found.singular_values[block], values)
        np.testing.assert_allclose(found.spread[block], values.std() / values.mean())
        cosines = np.linalg.svd(row_space(w) @ row_space(a).T, compute_uv=False)
        np.testing.assert_allclose(found.principal_angles[block], np.arccos(cosines))
        pairs = list(itertools.combinations(w.T, 2))
        coherence = max(abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs)
        np.testing.assert_allclose(found.coherence[block], coherence)
        squares = np.concatenate([np.linalg.svd(np.stack(pair), compute_uv=False) ** 2 for pair in pairs])
        distortion = (squares.max() - squares.min()) / (squares.max() + squares.min())
        np.testing.assert_allclose(found.distortion[block], distortion)


def test_angles_of_known_planes():
    angle = 0.3
    A = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    W = torch.tensor([[1.0, 0, 0], [0, math.cos(angle), math.sin(angle)]])
    np.testing.assert_allclose(geometry(W, A).principal_angles[0], [0, angle], atol=1e-6)


@given(SHAPES, SEEDS, st.floats(1e-3, 1e3))
def test_only_the_singular_values_see_the_scale(shape, seed, scale):
    W, A = draw(shape, seed), draw(shape, seed + 1)
    one, other = geometry(W, A), geometry(scale * W, A)
    for name in ("alignment", "coherence", "distortion", "spread"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(scale * one.singular_values, other.singular_values)
    torch.testing.assert_close(geometry(-W, A).alignment, -one.alignment)


@given(SHAPES, SEEDS)
def test_angles_do_not_see_row_mixing(shape, seed):
    W, A = draw(shape, seed), draw(shape, seed + 1)
    blocks, rows, _ = shape
    # Orthogonal factors around singular values of 1 to 2: a mixing that loses no digits.
    left, right = (torch.linalg.qr(draw((blocks, rows, rows), seed + k)).Q for k in (2, 3))
    mixed = left @ torch.diag(torch.linspace(1, 2, rows, dtype=torch.float64)) @ right @ W
    for one, other in zip(geometry(W, A).principal_angles, geometry(mixed, A).principal_angles, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert all(angles.max() < 1e-6 for angles in geometry(mixed, W).principal_angles)


@given(st.integers(1, 6), st.integers(0, 4), SEEDS, st.floats(0.1, 10))
def test_orthonormal_columns_are_an_isometry(columns, more, seed, scale):
    isometry = torch.linalg.qr(draw((columns + more, columns), seed)).Q
    found = geometry(scale * isometry, isometry, sparsity=columns)
    assert found.coherence < 1e-12 and found.distortion < 1e-12 and found.spread < 1e-12
    torch.testing.assert_close(found.singular_values, torch.full((1, columns), scale, dtype=torch.float64))


@given(SHAPES, SEEDS)
def test_ranges(shape, seed):
    found = geometry(draw(shape, seed), draw(shape, seed + 1))
    assert found.alignment.abs().max() <= 1 + 1e-12 and abs(found.overall_alignment) <= 1 + 1e-12
    _, rows, columns = shape
    welch = math.sqrt(max(0, columns - rows) / (rows * (columns - 1)))
    assert found.coherence.min() >= welch - 1e-9 and found.coherence.max() <= 1
    assert found.distortion.min() >= 0 and found.distortion.max() <= 1
    assert all(0 <= angle <= math.pi / 2 for angles in found.principal_angles for angle in angles)


@given(SHAPES, SEEDS)
def test_blocks_agree_with_the_dense_matrix(shape, seed):
    W, A = draw(shape, seed), draw(shape, seed + 1)
    by_block, dense = geometry(W, A, sparsity=1), geometry(torch.block_diag(*W), torch.block_diag(*A), sparsity=1)
    torch.testing.assert_close(by_block.overall_alignment, dense.alignment.item())
    torch.testing.assert_close(by_block.singular_values.flatten().sort().values, dense.singular_values[0].sort().values)
    together = torch.cat(by_block.principal_angles).sort().values
    torch.testing.assert_close(together, dense.principal_angles[0].sort().values, atol=1e-6, rtol=0)
    torch.testing.assert_close(by_block.coherence.max(), dense.coherence[0])


def test_more_samples_never_lower_the_bound_and_never_pass_the_constant():
    W = draw((5, 9), 0)
    bounds = [geometry(W, W, sparsity=3, samples=samples).distortion.item() for samples in (1, 10, 100)]
    sets = itertools.combinations(range(9), 3)
    squares = [np.linalg.svd(W.numpy()[:, list(chosen)], compute_uv=False) ** 2 for chosen in sets]
    least, largest = np.min(squares), np.max(squares)
    assert bounds == sorted(bounds) and bounds[-1] <= (largest - least) / (largest + least) + 1e-12
    # That is the least restricted-isometry constant over all scales.
    scales = np.linspace(0.01, 2, 20_000)[:, None]
    constants = np.abs(scales * np.array([least, largest]) - 1).max(1)
    assert bounds[-1] <= constants.min() + 1e-12
    assert abs(constants.min() - (largest - least) / (largest + least)) < 1e-3


def test_chunks_of_samples_change_nothing(monkeypatch):
    W = draw((2, 5, 9), 0)
    whole = geometry(W, W, sparsity=3)
    monkeypatch.setattr("lightning_modules.analysis.geometry.LARGEST_CHUNK", 40)
    torch.testing.assert_close(geometry(W, W, sparsity=3).distortion, whole.distortion)


def test_a_block_of_zeros_is_nan_and_the_others_are_not():
    A = draw((2, 3, 5), 0)
    W = A.clone()
    W[1] = 0
    table = compare_geometry({"W": W}, A)
    for values in (table.rows["W"].alignment, table.rows["W"].distortion):
        assert values[0].isfinite() and values[1].isnan()
    assert table.rows["W"].principal_angles[1].isnan().all()
    assert "nan" in str(table)


def test_rank_deficient_weights_have_as_many_angles_as_ranks():
    W = torch.ones(3, 5)
    assert [len(angles) for angles in geometry(W, draw((3, 5), 0)).principal_angles] == [1]


# Variants


@given(SHAPES, SEEDS, st.floats(1e-6, 1e6))
def test_variants_by_their_formulas(shape, seed, scale):
    latent = scale * draw(shape, seed)
    v, variants = latent.numpy(), {name: weight.numpy() for name, weight in weight_variants(latent).items()}
    magnitude, signs = np.abs(v), np.where(v >= 0, 1.0, -1.0)
    np.testing.assert_array_equal(variants["float"], v)
    np.testing.assert_allclose(variants["one-bit global"], magnitude.mean() * signs, rtol=1e-6)
    np.testing.assert_allclose(variants["one-bit channel-wise"], magnitude.mean(-1, keepdims=True) * signs)
    kept = magnitude > 0.7 * magnitude.mean()
    np.testing.assert_allclose(variants["ternary TWN"], magnitude[kept].mean() * signs * kept)
    steps = np.clip(np.round(v / magnitude.mean()), -1, 1)
    np.testing.assert_allclose(variants["ternary b1.58"], magnitude.mean() * steps)
    for name, count in (("one-bit global", 2), ("ternary TWN", 3), ("ternary b1.58", 3)):
        assert len(np.unique(np.abs(variants[name]))) <= count - 1 and len(np.unique(variants[name])) <= count


@given(SHAPES, SEEDS)
def test_variants_under_a_mask_are_those_of_the_structural_nonzeros(shape, seed):
    blocks, rows, columns = shape
    latent = draw(shape, seed)
    structure, dense_shape = BlockDiagonal(blocks), (blocks * rows, blocks * columns)
    noise = torch.where(structure.mask(dense_shape), 0.0, draw(dense_shape, seed + 1))  # the mask must remove it
    masked = weight_variants(torch.block_diag(*latent) + noise, mask=structure.mask(dense_shape))
    for name, weight in weight_variants(latent).items():
        torch.testing.assert_close(masked[name], torch.block_diag(*weight), msg=name)


def test_a_zero_latent_is_plus_one_bit_and_a_ternary_zero():
    variants = weight_variants(torch.tensor([[0.0, -2.0]]), scale=0.5)
    assert variants["one-bit global"].tolist() == [[0.5, -0.5]]
    assert variants["ternary TWN"].tolist() == [[0.0, -2.0]]


@given(SHAPES, SEEDS)
def test_the_float_variant_is_the_weight_and_signs_keep_their_signs(shape, seed):
    A = draw(shape, seed)
    table = compare_geometry(weight_variants(A), A, samples=5)
    operator, same = table.rows["(operator)"], table.rows["float"]
    for name in ("alignment", "singular_values", "coherence", "distortion"):
        assert torch.equal(getattr(operator, name), getattr(same, name))
    torch.testing.assert_close(same.alignment, torch.ones_like(same.alignment))
    for name, row in compare_geometry(weight_variants(A.sign()), A.sign(), samples=5).rows.items():
        torch.testing.assert_close(row.overall_alignment, 1.0, msg=name)


def test_alignment_with_a_gaussian_operator_has_its_closed_form():
    A = draw((8, 64, 128), 0)
    rows = compare_geometry(weight_variants(A), A, samples=1).rows
    assert rows["one-bit global"].overall_alignment == pytest.approx(math.sqrt(2 / math.pi), abs=0.005)

    def ternary(threshold):  # E|v|1(|v|>t) / sqrt(P(|v|>t)) of a standard normal v
        tail = math.erfc(threshold / math.sqrt(2))
        return math.sqrt(2 / math.pi) * math.exp(-(threshold**2) / 2) / math.sqrt(tail)

    mean = math.sqrt(2 / math.pi)
    assert rows["ternary TWN"].overall_alignment == pytest.approx(ternary(0.7 * mean), abs=0.005)
    assert rows["ternary b1.58"].overall_alignment == pytest.approx(ternary(0.5 * mean), abs=0.005)


def test_channelwise_scales_leave_the_row_space_but_not_after_transposition():
    A, V = draw((2, 4, 9), 0), draw((2, 4, 9), 1)
    rows = compare_geometry(weight_variants(V), A, samples=5).rows
    one, other = (rows[name].principal_angles for name in ("one-bit global", "one-bit channel-wise"))
    torch.testing.assert_close(one[0], other[0], atol=1e-6, rtol=0)
    rows = compare_geometry(weight_variants(V.mT), A, adjoint=True, samples=5).rows
    one, other = (rows[name].principal_angles for name in ("one-bit global", "one-bit channel-wise"))
    assert (one[0] - other[0]).abs().max() > 1e-3


# Tables


def test_the_table_says_what_its_numbers_assume():
    A = draw((2, 4, 8), 0)
    table = compare_geometry(weight_variants(A), A, sparsity=3, samples=17, seed=5, title="layer[0]")
    text = str(table)
    assert "s = 3, 17 sets of columns drawn uniformly (seed 5)" in text and "LOWER BOUND" in text
    assert "layer[0]" in text and "0.378 (Welch bound)" in text  # sqrt(4 / (4 * 7))
    assert max(map(len, text.splitlines())) <= 120
    line = next(line for line in text.splitlines() if "one-bit global" in line)
    row = table.rows["one-bit global"]
    assert line.split()[-9:] == [
        *(f"{number:.3f}" for number in (row.alignment.min(), row.overall_alignment)),
        *(f"{number:.3f}" for number in (row.singular_values.min(), row.singular_values.max(), row.spread.max())),
        f"{max(math.degrees(angles.mean()) for angles in row.principal_angles):.1f}",
        f"{max(math.degrees(angles.max()) for angles in row.principal_angles):.1f}",
        *(f"{number:.3f}" for number in (row.coherence.max(), row.distortion.max())),
    ]


def test_a_prepared_and_a_packed_network():
    A = draw((2, 4, 8), 0, torch.float32)
    model = nn.Sequential(BlockDiagonalLinear(8, 16, 2), nn.ReLU(), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.copy_(A.mT)
    prepare(model, {"0.weight": None, "2.weight": Banded(1, 1)})
    dense = torch.eye(16)
    tables = network_geometry(model, {"0.weight": A, "2.*": dense}, adjoint=True, samples=10)
    assert list(tables) == ["0.weight", "2.weight"] and tables["0.weight"].title == "0.weight"
    assert tables["0.weight"].rows["float"].overall_alignment == pytest.approx(1)
    scale, bits = global_scale(model)().item(), tables["0.weight"].rows["one-bit global"]
    expected = np.linalg.svd(scale * np.where(A.numpy() >= 0, 1.0, -1.0), compute_uv=False)
    np.testing.assert_allclose(bits.singular_values, expected, rtol=1e-5, atol=1e-9)
    packed = network_geometry(convert(model), {"0.weight": A, "2.*": dense}, adjoint=True, samples=10)
    for name, table in packed.items():
        assert list(table.rows) == ["(operator)", "one-bit global"]
        torch.testing.assert_close(
            table.rows["one-bit global"].alignment, tables[name].rows["one-bit global"].alignment
        )
        torch.testing.assert_close(
            table.rows["one-bit global"].singular_values, tables[name].rows["one-bit global"].singular_values
        )


def test_trained_twins_are_rows_of_their_own():
    A = draw((2, 4, 8), 0, torch.float32)
    compact, dense = nn.Sequential(BlockDiagonalLinear(8, 16, 2)), nn.Sequential(nn.Linear(8, 16))
    with torch.no_grad():
        compact[0].weight.copy_(2 * A.mT)
        dense[0].weight.copy_(torch.block_diag(*A.mT.sign()))
    model = prepare(nn.Sequential(BlockDiagonalLinear(8, 16, 2)), {"0.weight": None})
    packed = convert(prepare(nn.Sequential(BlockDiagonalLinear(8, 16, 2)), {"0.weight": None}))
    twins = {"float, trained": compact, "dense": dense, "packed": packed}
    rows = network_geometry(model, {"0.weight": A}, adjoint=True, twins=twins, samples=5)["0.weight"].rows
    assert list(rows)[-3:] == list(twins)
    assert rows["float, trained"].overall_alignment == pytest.approx(1)
    torch.testing.assert_close(rows["float, trained"].singular_values, 2 * rows["(operator)"].singular_values)
    assert rows["dense"].overall_alignment == pytest.approx(math.sqrt(2 / math.pi), abs=0.1)
    assert rows["packed"].overall_alignment != rows["one-bit global"].overall_alignment
    with pytest.raises(StructureError, match=r"'other' has no weight '0.weight'"):
        network_geometry(model, {"0.weight": A}, adjoint=True, twins={"other": nn.Linear(8, 16)})
    with pytest.raises(StructureError, match=r"of 'other' has shape \(16, 9\); expected \(16, 8\)"):
        network_geometry(model, {"0.weight": A}, adjoint=True, twins={"other": nn.Sequential(nn.Linear(9, 16))})


def test_a_block_diagonal_weight_as_blocks_and_as_a_matrix():
    A = draw((2, 4, 8), 0, torch.float32)
    model = prepare(nn.Sequential(nn.Linear(16, 8)), {"0.weight": BlockDiagonal(2)})
    by_block = network_geometry(model, {"0.weight": A}, sparsity=1)["0.weight"]
    dense = network_geometry(model, {"0.weight": torch.block_diag(*A)}, sparsity=1)["0.weight"]
    for name, row in dense.rows.items():
        torch.testing.assert_close(row.overall_alignment, by_block.rows[name].overall_alignment, msg=name)
        torch.testing.assert_close(row.coherence.max(), by_block.rows[name].coherence.max(), msg=name)


# Errors


@pytest.mark.parametrize(
    ("weight", "operator", "options", "message"),
    [
        (torch.ones(3, 2), torch.ones(2, 3), {}, "adjoint=True would fit"),
        (torch.ones(2, 3), torch.ones(2, 3), {"adjoint": True}, r"expected .* = \(1, 3, 2\).*adjoint=False would fit"),
        (torch.ones(2, 2, 3), torch.ones(2, 3), {}, r"\(2, 2, 3\); expected"),
        (torch.ones(3), torch.ones(2, 3), {}, "the weight 'W' has shape"),
        (torch.full((2, 3), math.nan), torch.ones(2, 3), {}, "finite"),
        (torch.ones(2, 3), torch.zeros(2, 3), {}, "a block of zeros"),
        (torch.ones(2, 3), torch.ones(0, 3), {}, "the operator"),
    ],
)
def test_what_does_not_fit_is_refused(weight, operator, options, message):
    with pytest.raises(StructureError, match=message):
        geometry(weight, operator, **options)


@pytest.mark.parametrize("options", [{"sparsity": 0}, {"sparsity": 4}, {"samples": 0}])
def test_impossible_samples_are_refused(options):
    matrix = torch.ones(2, 3)
    with pytest.raises(ValueError, match="expected 1 to 3 columns"):
        geometry(matrix, matrix, **options)


def test_networks_that_do_not_fit_are_refused():
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ScaleError):
        network_geometry(model, {"*": torch.ones(4, 6)})
    prepare(model, {"0.weight": None})
    with pytest.raises(StructureError, match=r"'1\.weight' matches no one-bit weight.*0\.weight"):
        network_geometry(model, {"1.weight": torch.ones(4, 6)})
    with pytest.raises(StructureError, match="give it as a matrix"):
        network_geometry(model, {"0.weight": torch.ones(2, 2, 3)})


def test_bad_masks_and_latents_are_refused():
    latent = torch.ones(2, 3)
    for mask in (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)):
        with pytest.raises(StructureError, match="expected torch"):
            weight_variants(latent, mask=mask)
    with pytest.raises(PIBiNNError, match="mean of"):
        weight_variants(torch.zeros(2, 3))
