"""Structures of deepinv's physics, where deepinv is installed; the table in benchmarks/results has more of them."""

import pytest
import torch

from lightning_modules.operators import FlattenedPhysics
from lightning_modules.solvers.coupled_ista import CoupledISTA
from pibinn_plugin.structure import Mask, structure_from_operator

deepinv = pytest.importorskip("deepinv", reason="deepinv is not installed (pip install deepinv)")
IMAGE = (1, 16, 16)


def blur_by_fft():
    kernel = deepinv.physics.functional.blur.gaussian_blur(sigma=(0.4, 0.4))
    return FlattenedPhysics(deepinv.physics.BlurFFT(IMAGE, kernel), IMAGE)


def tomography():
    return FlattenedPhysics(deepinv.physics.Tomography(angles=8, img_width=16, normalize=True), IMAGE)


@pytest.mark.filterwarnings("ignore::pibinn_plugin.structure.SmallEntriesWarning")
@pytest.mark.parametrize(("make", "nnz"), [(blur_by_fft, 3328), (tomography, 3987)])
def test_rounding_is_no_support(make, nnz):
    operator = make()
    assert structure_from_operator(operator).nnz(operator.shape) == nnz
    solver = CoupledISTA(operator, layers=2)
    assert sum(layer.weight.numel() for layer in solver.layers) == 2 * nnz
    assert solver(torch.randn(3, operator.shape[0])).shape == (3, 256)


def test_inpainting_is_a_mask():
    operator = FlattenedPhysics(deepinv.physics.Inpainting(IMAGE, mask=0.5), IMAGE)
    matrix = operator.A(torch.eye(256)).T
    assert structure_from_operator(operator) == Mask(matrix)
    assert len(Mask(matrix).to_bytes()) < 2 * 4 * 256  # the orders of permuted blocks
