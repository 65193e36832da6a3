"""LISTA, UnrolledADMM, ConvolutionalLISTA: the classical algorithm before training, and one-bit weights after it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pibinn_plugin as pb
from lightning_modules.operators import BlockOperator, GaussianBlocks, SignBlocks, SubsampledDCT
from lightning_modules.solvers.admm import UnrolledADMM
from lightning_modules.solvers.convolutional_lista import ConvolutionalLISTA
from lightning_modules.solvers.lista import LISTA

SOLVERS = {
    "lista": (lambda: LISTA(SignBlocks(2, 4, 8), layers=3), (8,)),
    "lista, one block": (lambda: LISTA(SubsampledDCT(6, 16), layers=3), (6,)),
    "admm": (lambda: UnrolledADMM(SignBlocks(2, 4, 8), layers=3), (8,)),
    "admm, one block": (lambda: UnrolledADMM(SubsampledDCT(6, 16), layers=3), (6,)),
    "convolutional": (lambda: ConvolutionalLISTA(channels=9, layers=3, kernel_size=3), (1, 12, 10)),
}
all_solvers = pytest.mark.parametrize("kind", SOLVERS)


def build(kind):
    """The solver, and a batch of measurements for it."""
    make, shape = SOLVERS[kind]
    return make(), torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))


def soft(x, threshold):
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0)


@pytest.mark.parametrize("operator", [GaussianBlocks(2, 6, 12, seed=1), SubsampledDCT(6, 12, seed=2)])
def test_an_untrained_lista_is_ista(operator):
    a = operator.A(torch.eye(operator.shape[1])).T.double().numpy()
    y = np.random.default_rng(0).standard_normal((4, operator.shape[0]))
    step, x = 1 / np.linalg.norm(a, 2) ** 2, 0
    for _ in range(5):
        x = soft(x + step * (y - (x @ a.T if np.ndim(x) else 0)) @ a, 0.05)
    solver = LISTA(operator, layers=5)
    np.testing.assert_allclose(solver(torch.from_numpy(y).float()).detach(), x, atol=1e-5)


@pytest.mark.parametrize("operator", [GaussianBlocks(2, 6, 12, seed=1), SubsampledDCT(6, 12, seed=2)])
def test_an_untrained_admm_is_admm(operator):
    a = operator.A(torch.eye(operator.shape[1])).T.double().numpy()
    y = np.random.default_rng(0).standard_normal((4, operator.shape[0]))
    inverse = np.linalg.inv(a.T @ a + 0.7 * np.eye(a.shape[1]))
    z, u = np.zeros((4, a.shape[1])), np.zeros((4, a.shape[1]))
    for _ in range(6):
        x = (y @ a + 0.7 * (z - u)) @ inverse
        z = soft(x + u, 0.05)
        u = u + x - z
    solver = UnrolledADMM(operator, layers=6, penalty=0.7)
    np.testing.assert_allclose(solver(torch.from_numpy(y).float()).detach(), z, atol=1e-5)


@pytest.mark.parametrize("channels", [25, 10])
def test_an_untrained_convolutional_lista_is_ista_for_cosine_atoms(channels):
    k = np.arange(5)[:, None]
    waves = np.sqrt(2 / 5) * np.cos(np.pi * k * (2 * np.arange(5) + 1) / 10)
    waves[0] /= np.sqrt(2)
    order = sorted(((i, j) for i in range(5) for j in range(5)), key=sum)
    atoms = torch.from_numpy(np.array([np.outer(waves[i], waves[j]) for i, j in order[:channels]])).float()[:, None] / 5
    y = torch.rand(2, 1, 11, 9, generator=torch.Generator().manual_seed(1))
    z = torch.zeros(2, channels, 11, 9)
    for _ in range(4):
        residual = y - F.conv_transpose2d(z, atoms, padding=2)
        z = F.softshrink(z + F.conv2d(residual, atoms, padding=2), 0.1 / 5)
    expected = F.conv_transpose2d(z, atoms, padding=2)
    solver = ConvolutionalLISTA(channels, layers=4, kernel_size=5)
    torch.testing.assert_close(solver(y), expected, atol=1e-5, rtol=1e-5)


def test_the_cosine_dictionary_has_norm_one():
    # On an image far larger than the filters, its square is the identity away from the border.
    solver = ConvolutionalLISTA(channels=25, layers=1, kernel_size=5)
    image = torch.rand(1, 1, 30, 30, generator=torch.Generator().manual_seed(2))
    code = solver.analysis_convolutions[0](image)
    torch.testing.assert_close(solver.synthesis_convolutions[0](code)[..., 4:-4, 4:-4], image[..., 4:-4, 4:-4])


@all_solvers
def test_every_parameter_has_a_gradient(kind):
    solver, y = build(kind)
    solver(y).square().sum().backward()
    for name, parameter in solver.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@all_solvers
def test_every_weight_matches_the_targets_and_nothing_else_does(kind):
    solver, _ = build(kind)
    holder = torch.nn.Module()
    holder.solver = solver
    names = {target.name for target in pb.targets.resolve_targets(holder, {"solver.*.weight": None})}
    scalars = {name for name, _ in holder.named_parameters()} - names
    assert names and all(
        name.rpartition(".")[2].endswith(("step_sizes", "thresholds")) and ".weight" not in name for name in scalars
    )
    assert {name for name, parameter in holder.named_parameters() if name.endswith("weight")} == names


@all_solvers
def test_samples_do_not_see_each_other(kind):
    solver, y = build(kind)
    together = solver(y)
    torch.testing.assert_close(together, torch.cat([solver(sample[None]) for sample in y]))


@all_solvers
@pytest.mark.parametrize("scheme", ["native", "torchao"])
def test_one_bit_weights_survive_convert_save_and_load(kind, scheme, tmp_path):
    solver, y = build(kind)
    pb.prepare(solver, {"*.weight": None}, scheme)
    with torch.no_grad():
        for latent in (weight.latent for weight in pb.workflow.quantized_weights(solver)):
            latent.add_(0.3 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(1)))
    expected = solver(y)
    packed = pb.convert(solver)
    torch.testing.assert_close(packed(y), expected)
    loaded = pb.load(pb.save(packed, tmp_path / "solver.safetensors"), into=build(kind)[0])
    assert torch.equal(loaded(y), packed(y))
    float_output = build(kind)[0](y)
    assert not torch.allclose(expected, float_output)  # the one-bit network is another one


@pytest.mark.parametrize("solver", [LISTA, UnrolledADMM])
def test_blocks_of_the_physics_stay_blocks(solver):
    for layer in solver(GaussianBlocks(3, 4, 6), layers=2).modules():
        if hasattr(layer, "structure"):
            assert layer.structure == pb.BlockDiagonal(3)


def test_one_bit_corrections_of_equal_magnitude_start_where_the_float_twin_does():
    # With orthogonal rows of ±1, ADMM's correction is a multiple of Aᵀ: nothing is lost to its signs.
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1]])
    solver = UnrolledADMM(BlockOperator(torch.stack([hadamard, -hadamard])), layers=3)
    y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = solver(y)
    torch.testing.assert_close(pb.prepare(solver, {"layers.*.weight": None})(y), expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LISTA(SignBlocks(2, 4, 8), layers=0), "layers=0"),
        (lambda: UnrolledADMM(SignBlocks(2, 4, 8), layers=0), "layers=0"),
        (lambda: UnrolledADMM(SignBlocks(2, 4, 8), penalty=0.0), "penalty=0.0"),
        (lambda: ConvolutionalLISTA(kernel_size=4), "kernel_size=4"),
        (lambda: ConvolutionalLISTA(channels=10, kernel_size=3), "channels=10"),
        (lambda: LISTA(SignBlocks(2, 4, 8))(torch.zeros(5, 9)), r"\(5, 9\); expected 8"),
        (lambda: UnrolledADMM(SignBlocks(2, 4, 8))(torch.zeros(5, 9)), r"\(5, 9\); expected 8"),
        (lambda: ConvolutionalLISTA()(torch.zeros(5, 8, 8)), r"\(5, 8, 8\)"),
    ],
)
def test_errors_name_what_was_given(make, words):
    with pytest.raises(ValueError, match=words):
        make()
