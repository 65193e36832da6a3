"""What moves the output of any solver: against the Jacobian and all flips."""

import copy

import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.analysis.network import one_bit_weights
from lightning_modules.analysis.sensitivity import sensitivity
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA
from lightning_modules.solvers.hidden_lista import HiddenLISTA
from lightning_modules.solvers.learned_amp import LearnedAMP


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
@pytest.mark.parametrize("solver", [CoupledISTA, LearnedAMP])
def test_gains_and_flips_against_all_of_them(solver, scheme):
    torch.manual_seed(0)
    model = pb.prepare(solver(SignBlocks(2, 3, 4), 2), {"layers.*.weight": None}, scheme)
    y = torch.randn(4, 6)
    before = copy.deepcopy(model.state_dict())
    report = sensitivity(model, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    norms = [torch.linalg.matrix_norm(torch.autograd.functional.jacobian(model, each[None])[0, :, 0], 2) for each in y]
    assert report.gain == pytest.approx(max(norms).item(), rel=0.02)
    with torch.no_grad():
        output = model(y)
        for weight in one_bit_weights(model):
            flat, worst = weight.parameter.view(-1), 0.0
            for entry in range(flat.numel()):
                flat[entry] *= -1
                moved = (model(y) - output).norm(dim=1) / output.norm(dim=1)
                worst = max(worst, moved.nan_to_num(0).max().item())
                flat[entry] *= -1
            assert 0.3 * worst <= report.flips[weight.name] <= worst * (1 + 1e-5)


def test_frozen_latents_stay_frozen():
    model = pb.freeze_signs(pb.prepare(CoupledISTA(SignBlocks(2, 3, 4), 2), {"layers.*.weight": None}))
    assert len(sensitivity(model, torch.randn(3, 6)).flips) == 2
    assert not any(weight.parameter.requires_grad for weight in one_bit_weights(model))


def test_a_solver_without_any_operator():
    solver = HiddenLISTA(channels=8, layers=2, stride=4, frequencies=4, groups=2)
    model = pb.prepare(solver, {"*_convolution*.weight": None})
    report = sensitivity(model, torch.randn(2, 64))
    assert report.gain > 0
    assert set(report.flips) == {weight.name for weight in one_bit_weights(model)}
