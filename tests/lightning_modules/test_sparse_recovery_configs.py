"""The committed configs of sparse recovery: each builds, its targets fit, and it takes a training step."""

import sys
from pathlib import Path

import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.modules import SolverModule
from lightning_modules.operators import operator_blocks
from lightning_modules.solver_cli import SolverCLI
from lightning_modules.trainer import SolverTrainer
from pibinn_plugin.workflow import quantized_weights

CONFIGS = sorted(
    [
        *Path(__file__).parents[2].glob("configs/sparse_recovery*.yaml"),
        *Path(__file__).parents[2].glob("configs/large.yaml"),
    ]
)
# The large one in small: its noise is calibrated on gigabytes of unknowns.
FEWER = [f"--{part}.init_args.operator.init_args.blocks=4" for part in ("model.solver", "data")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_the_one_bit_weights_of_its_physics(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_modules"])  # LightningCLI looks at them too
    options = FEWER if path.stem == "large" else []
    cli = SolverCLI(SolverModule, trainer_class=SolverTrainer, run=False, args=["--config", str(path), *options])
    callback = next(callback for callback in cli.trainer.callbacks if isinstance(callback, pb.TwoStageQAT))
    solver, operator = cli.model.solver, cli.datamodule.operator
    unit = torch.eye(operator.shape[1])[:5]
    assert torch.equal(operator.A(unit), solver.operator.A(unit))  # data and solver have the same physics
    pb.prepare(cli.model, callback.targets, callback.scheme)
    links = sum(weight.quantizer.structure.nnz(weight.quantizer.shape) for weight in quantized_weights(cli.model))
    assert links == len(solver.layers) * sum(block.count_nonzero() for block in operator_blocks(operator))
    y, x = cli.datamodule.draw(3, seed=1)
    cli.model.loss(cli.model(y), x).backward()
    for name, parameter in cli.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
