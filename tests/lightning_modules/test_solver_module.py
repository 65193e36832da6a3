"""SolverModule and checkpoints: what it loads, and what it says of what it cannot load."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

import pibinn_plugin as pb
from lightning_modules.modules import SolverModule
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA

TARGETS = {"solver.layers.*.weight": None}


class SmallSolver(SolverModule):
    def __init__(self, layers=2):
        super().__init__(CoupledISTA(SignBlocks(2, 4, 8), layers))


class PreparesItself(SmallSolver):
    def configure_model(self):
        if not pb.weights.one_bit_weights(self):
            pb.prepare(self, TARGETS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    callbacks = [pb.TwoStageQAT(TARGETS, scale_stage_start=0.5), ModelCheckpoint(directory, filename="last")]
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SmallSolver()
    data = TensorDataset(torch.randn(8, 8), torch.randn(8, 16))
    trainer.fit(module, DataLoader(data, batch_size=4))
    return directory / "last.ckpt", module


def test_a_module_that_is_not_prepared_says_so(checkpoint):
    path, _ = checkpoint
    with pytest.raises(MisconfigurationException, match=r"scheme native.*prepare it first.*TwoStageQAT callback"):
        SmallSolver.load_from_checkpoint(path)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(MisconfigurationException, match="prepare it first"):
        trainer.test(SmallSolver(), DataLoader(TensorDataset(torch.zeros(1, 8), torch.zeros(1, 16))), ckpt_path=path)


def test_a_module_that_prepares_itself_is_loaded(checkpoint):
    path, trained = checkpoint
    loaded = PreparesItself.load_from_checkpoint(path)
    y = torch.randn(3, 8)
    assert torch.equal(loaded(y), trained(y))
    assert all(weight.is_frozen for weight in pb.workflow.quantized_weights(loaded))


def test_another_network_is_one_line(checkpoint):
    path, _ = checkpoint
    module = pb.prepare(SmallSolver(layers=3), TARGETS)
    with pytest.raises(MisconfigurationException, match="that of another network than this one") as error:
        module.load_state_dict(torch.load(path)["state_dict"])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
