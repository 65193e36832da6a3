"""Fields on a torus: against a dense matrix written by hand, packed and read back, errors."""

import numpy as np
import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.solvers.local_fields import LocalFields, local_fields


def dense(couplings):
    """W as a symmetric matrix over all sites, edge by edge."""
    size = couplings.shape[-1]
    matrix = np.zeros((size * size, size * size))
    for row in range(size):
        for column in range(size):
            site = row * size + column
            right = row * size + (column + 1) % size
            below = (row + 1) % size * size + column
            for neighbour, direction in ((right, 0), (below, 1)):
                matrix[site, neighbour] = matrix[neighbour, site] = couplings[direction, row, column]
    return matrix


def random_spins(count, size):
    return torch.randint(2, (count, size, size)) * 2.0 - 1.0


@pytest.mark.parametrize("size", [4, 6, 16])
def test_fields_are_those_of_the_dense_matrix(size):
    couplings, spins = torch.randn(2, size, size), random_spins(7, size)
    matrix = dense(couplings.numpy())
    assert np.count_nonzero(matrix) == 4 * size * size
    expected = spins.flatten(1).numpy() @ matrix
    np.testing.assert_allclose(local_fields(spins, couplings).flatten(1).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_value_an_edge_is_trained_stored_and_packed(tmp_path):
    solver = pb.prepare(LocalFields(size=6), {"weight": None})
    spins = random_spins(5, 6)
    packed = pb.convert(solver, args=(spins,))
    assert pb.summary(packed).nnz == 72
    assert pb.summary(packed).payload_bytes == 9
    path = pb.save(packed, tmp_path / "glass.safetensors")
    into, anew = pb.load(path, into=LocalFields(size=6)), pb.load(path)
    for loaded in (packed, into, anew):
        assert torch.equal(loaded(spins), solver(spins))
    assert isinstance(anew, LocalFields)


@pytest.mark.parametrize("size", [3, 5, 2, 0, -4])
def test_a_torus_without_a_checkerboard_is_refused(size):
    with pytest.raises(ValueError, match=f"size is {size}"):
        LocalFields(size)


def test_spins_of_another_lattice_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4, 6\); expected \(batch, 4, 4\)"):
        LocalFields(4)(torch.ones(3, 4, 6))
