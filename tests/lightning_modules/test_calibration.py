"""The calibration experiment from its configuration: an unknown ±1 operator is found, and unknowns are recovered."""

from pathlib import Path

import pytest
import torch

from lightning_modules.cli import main
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.metrics import nmse_db
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.calibrated_amp import CalibratedAMP
from pibinn_plugin import BlockDiagonal, load

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
CONFIG = Path(__file__).parents[2] / "configs" / "calibration.yaml"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed solver after 20 steps on 100 pairs of an operator of four blocks."""
    directory = tmp_path_factory.mktemp("calibration")
    arguments = ["--config", str(CONFIG), "--trainer.default_root_dir", str(directory)]
    arguments += ["--model.solver.init_args.measurements=128", "--model.solver.init_args.unknowns=256"]
    arguments += ["--model.solver.init_args.structure.init_args.blocks=4"]
    arguments += ["--data.operator.init_args.blocks=4", "--data.evaluation_examples=100"]
    short = ["--trainer.max_epochs=1", "--data.train_examples=2000", "--trainer.enable_progress_bar=false"]
    main(["fit", *arguments, *short])
    main(["convert", *arguments])
    return load(directory / "solver.safetensors", into=CalibratedAMP(128, 256, BlockDiagonal(4)))


@pytest.fixture
def data():
    return SparseRecovery(SignBlocks(4, 32, 64, seed=1), snr_db=20.0, training_pairs=100, seed=1)


def test_the_operator_is_found(packed, data):
    assert torch.equal(packed.operator.weight.sign(), data.operator.blocks.sign())


def test_unknowns_are_recovered_from_new_measurements(packed, data):
    y, x = data.draw(500, seed=77)
    guessed = CalibratedAMP(128, 256, BlockDiagonal(4))
    with torch.no_grad():
        assert nmse_db(packed(y), x) < -12
        assert nmse_db(guessed(y), x) > -1  # what a random operator is worth
