"""LearnedAMP and CalibratedAMP: the iteration against numpy, structures, schemes, packing, what they recover."""

import numpy as np
import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.metrics import nmse_db
from lightning_modules.operators import BlockOperator, GaussianBlocks, SignBlocks, SubsampledDCT
from lightning_modules.solvers.calibrated_amp import CalibratedAMP
from lightning_modules.solvers.learned_amp import LearnedAMP
from lightning_modules.solvers.message_passing import MessagePassing
from pibinn_plugin import functional, packing
from pibinn_plugin.functional import kernel
from pibinn_plugin.schemes import SCHEMES

STRUCTURES = [
    (pb.Dense(), (4, 6)),
    (pb.BlockDiagonal(2), (4, 6)),
    (pb.BlockDiagonal(rows=(1, 3), columns=(4, 2)), (4, 6)),
    (pb.BlockDiagonal(2, row_order=(2, 0, 3, 1), column_order=(5, 1, 0, 2, 4, 3)), (4, 6)),
    (pb.Banded(1, 2), (5, 7)),
    (pb.Mask([[1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 1, 1], [0, 1, 0, 0]]), (4, 4)),
]


def randomised(solver, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in solver.named_parameters():
            if not name.endswith(("weight", "original", "pibinn_scale.value")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return solver.double()


def in_numpy(solver, a, corrections, y, blocks):
    """The iteration as its docstring has it, sample by sample and block by block."""
    scalars = {name: value.detach().numpy() for name, value in solver.iteration.named_parameters()}
    estimates = []
    for sample in y:
        x = previous = np.zeros(a.shape[1])
        residual = np.zeros(a.shape[0])
        for k, correction in enumerate(corrections):
            z = x + scalars["momenta"][k] * (x - previous)
            density = np.repeat([np.count_nonzero(part) for part in np.split(x, blocks)], a.shape[0] // blocks)
            residual = sample - a @ z + scalars["onsager"][k] * density / (a.shape[0] / blocks) * residual
            u = z + correction @ residual
            rms = np.sqrt([np.mean(part**2) for part in np.split(residual, blocks)])
            t = 0.2 * abs(scalars["thresholds"][k]) + abs(scalars["residual_thresholds"][k]) * rms
            t, w = np.repeat(t, a.shape[1] // blocks), 10 * abs(scalars["widths"][k]) + 0.01
            shrunk = np.maximum(np.abs(u) - t, 0) * (1 + w) / w
            previous, x = x, np.sign(u) * np.minimum(np.abs(u), shrunk)
        estimates.append(x)
    return np.stack(estimates)


@pytest.mark.parametrize("correction", ["learned", "physics", "both"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_iteration_with_a_known_operator(correction, blocks):
    operator = GaussianBlocks(blocks, 4, 8, seed=1).double()
    solver = randomised(LearnedAMP(operator, layers=4, correction=correction))
    a = torch.block_diag(*operator.blocks).numpy()
    steps = np.zeros((4, *a.T.shape))
    for k in range(4):
        if correction != "physics":
            weight = solver.layers[k].weight.detach()
            weight = weight if blocks == 1 else torch.block_diag(*weight)
            steps[k] += solver.step_sizes[k].item() * weight.numpy()
        if correction != "learned":
            steps[k] += solver.physics_step_sizes[k].item() * a.T
    y = np.random.default_rng(0).standard_normal((5, a.shape[0]))
    found = solver(torch.from_numpy(y)).detach().numpy()
    np.testing.assert_allclose(found, in_numpy(solver, a, steps, y, blocks), atol=1e-10)


@pytest.mark.parametrize(("structure", "shape"), STRUCTURES)
def test_the_iteration_with_a_learned_operator(structure, shape):
    solver = randomised(CalibratedAMP(*shape, structure, layers=4))
    weight = solver.operator.weight.detach()
    a = (weight if isinstance(structure, pb.Dense) else structure.to_dense(weight, shape)).numpy()
    steps = [step.item() * a.T for step in solver.step_sizes]
    y = np.random.default_rng(0).standard_normal((5, shape[0]))
    blocks = 2 if structure == pb.BlockDiagonal(2) else 1
    np.testing.assert_allclose(
        solver(torch.from_numpy(y)).detach().numpy(), in_numpy(solver, a, steps, y, blocks), atol=1e-10
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("structure", [pb.BlockDiagonal(2), pb.Banded(1, 2), pb.Dense()])
def test_a_learned_operator_is_one_bit_forward_and_adjoint_in_every_scheme(scheme, structure):
    y = torch.randn(3, 8)
    torch.manual_seed(2)
    twin = CalibratedAMP(8, 12, structure, layers=3)
    torch.manual_seed(2)
    solver = pb.prepare(CalibratedAMP(8, 12, structure, layers=3), {"operator.weight": None}, scheme)
    with torch.no_grad():
        weight = twin.operator.weight
        weight.copy_(weight.abs().mean() * weight.sign())
    torch.testing.assert_close(solver(y), twin(y))
    torch.testing.assert_close(pb.convert(solver)(y), twin(y))


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 0 if kernel() != "torch" else 1), (torch.float64, 1)])
def test_a_packed_operator_is_unpacked_once_a_forward_or_not_at_all(monkeypatch, dtype, times):
    solver = CalibratedAMP(8, 12, pb.BlockDiagonal(2), layers=6).to(dtype)
    packed = pb.convert(pb.prepare(solver, {"operator.weight": None}))
    unpacked = []
    for module in (packing, functional):
        unpack_signs = module.unpack_signs
        monkeypatch.setattr(module, "unpack_signs", lambda *args, f=unpack_signs: (unpacked.append(1), f(*args))[1])
    y = torch.randn(3, 8, dtype=dtype)
    torch.testing.assert_close(packed(y), solver(y))
    assert len(unpacked) == times


def test_signs_of_a_sign_operator_lose_nothing():
    y = torch.randn(5, 8)
    solver = LearnedAMP(SignBlocks(2, 4, 8), layers=3, correction="both")
    expected = solver(y)
    torch.testing.assert_close(pb.prepare(solver, {"layers.*.weight": None})(y), expected)


@pytest.mark.parametrize("operator", [GaussianBlocks(4, 16, 32, seed=2), SubsampledDCT(64, 128, seed=1)])
@pytest.mark.parametrize("pseudo_inverse", [False, True])
def test_the_start_recovers_better_the_more_layers_there_are(operator, pseudo_inverse):
    y, x = SparseRecovery(operator, sparsity=0.05, snr_db=40.0).draw(400, seed=1)
    errors = []
    with torch.no_grad():
        for correction in ("learned", "physics"):
            for layers in (2, 12):
                solver = LearnedAMP(operator, layers, correction, pseudo_inverse)
                errors.append(nmse_db(solver(y), x).item())
    shallow, deep, shallow_physics, deep_physics = errors
    assert deep < min(shallow - 3, -10)
    assert (shallow_physics, deep_physics) == pytest.approx((shallow, deep), abs=1e-3)


def test_weights_start_at_the_pseudo_inverse():
    operator = BlockOperator(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)))
    solver = LearnedAMP(operator, layers=1, pseudo_inverse=True)
    for weight, block in zip(solver.layers[0].weight.detach(), operator.blocks, strict=True):
        torch.testing.assert_close((weight * block.T).sum(1), torch.ones(8))
        inverse = torch.linalg.pinv(block)
        cosines = torch.nn.functional.cosine_similarity(weight, inverse, dim=1)
        assert cosines.min() > 0.95


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match="layers=0"):
        CalibratedAMP(4, 6, pb.Dense(), layers=0)
    with pytest.raises(ValueError, match="blocks=0"):
        MessagePassing(3, 0)
    with pytest.raises(ValueError, match="correction='none'"):
        LearnedAMP(SignBlocks(2, 4, 8), correction="none")
    with pytest.raises(pb.StructureError, match="3 equal blocks"):
        CalibratedAMP(4, 6, pb.BlockDiagonal(3))
    for solver in (CalibratedAMP(8, 12, pb.Dense()), LearnedAMP(SignBlocks(2, 4, 8))):
        with pytest.raises(ValueError, match=r"\(5, 9\).*8 measurements"):
            solver(torch.zeros(5, 9))
