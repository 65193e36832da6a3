"""TwoStageQAT and checkpoints: what they hold, what a resumed or a killed training repeats, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import train_and_die
import two_stage
from fit_two_stage import C, S, W, assert_equal, fit, moved, state_of
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from two_stage import EPOCHS, TARGETS, SmallModule

import pibinn_plugin as pb
from pibinn_plugin.schemes import SCHEMES
from pibinn_plugin.training_checks import check_checkpoint

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The dirpath has changed",
        "Be aware that when using `ckpt_path`, callbacks used",
        "You're resuming from a checkpoint that ended before",
        "The checkpoint .* holds no random state",
    )
]


class LoadsTheLast(pl.Callback):
    """Loads each checkpoint into a fresh model while training goes on."""

    def __init__(self, directory, scheme):
        self.directory, self.scheme, self.loaded = directory, scheme, 0

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            return
        path = self.directory / f"epoch={trainer.current_epoch - 1}.ckpt"
        module = SmallModule()
        pb.prepare(module, TARGETS, self.scheme)
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert moved(state_of(module), state_of(pl_module)) == self.changed_since(trainer)
        self.loaded += 1

    def changed_since(self, trainer):
        return {"pibinn_scale.value"} if trainer.current_epoch == 2 else set()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoints_load_into_fresh_modules_in_every_stage(tmp_path, scheme):
    loads = LoadsTheLast(tmp_path, scheme)
    diary = fit(SmallModule(), two_stage.callback(scheme), loads, directory=tmp_path)
    assert loads.loaded == EPOCHS - 1
    for epoch, stage in enumerate([W, W, S, S, C, C]):
        path = tmp_path / f"epoch={epoch}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["TwoStageQAT"]
        assert (state["stage"], state["scheme"]) == (stage, scheme)
        tester = train_and_die.quiet_trainer(callbacks=[two_stage.callback(scheme)])
        (result,) = tester.test(SmallModule(), ckpt_path=path, weights_only=True, verbose=False)
        assert result["test/loss"] == diary.metrics[epoch]["val/loss"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resuming_repeats_from_every_epoch(tmp_path, scheme):
    whole = fit(two_stage.NoisyModule(), two_stage.callback(scheme), directory=tmp_path / "whole")
    expected = torch.load(tmp_path / "whole" / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)
    for epoch in range(EPOCHS - 1):
        directory = tmp_path / f"resumed {epoch}"
        path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        resumed = fit(two_stage.NoisyModule(), two_stage.callback(scheme), resume=path, directory=directory)
        steps = len(resumed.stages)
        assert steps == 2 * (EPOCHS - 1 - epoch)
        for name in ("stages", "losses", "scales"):
            assert getattr(resumed, name) == getattr(whole, name)[-steps:]
        assert resumed.metrics == whole.metrics[epoch + 1 :]
        found = torch.load(directory / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)
        for name in ("state_dict", "optimizer_states", "epoch", "global_step"):
            assert_equal(found[name], expected[name])
        assert_equal(found["callbacks"]["TwoStageQAT"], expected["callbacks"]["TwoStageQAT"])


@pytest.mark.parametrize("when", [{"save_on_train_epoch_end": False}, {"every_n_train_steps": 3}])
def test_resuming_inside_an_epoch(tmp_path, when):
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    whole = fit(SmallModule(), two_stage.callback(), checkpoints, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 12 // when.get("every_n_train_steps", 2)
    for path in paths:
        resumed = fit(SmallModule(), two_stage.callback(), resume=path)
        stages = whole.stages[int(path.stem.removeprefix("step=")) :]
        assert resumed.stages == stages
        if "every_n_train_steps" not in when:  # the loader does not go on inside an epoch, so losses differ there
            assert resumed.losses == whole.losses[len(whole.losses) - len(stages) :]
            assert_equal(resumed.states[-1], whole.states[-1])


def test_a_killed_training_equals_an_undisturbed_one(tmp_path):
    # "named" is the end of an epoch: its checkpoint is there. After five of them, one epoch is left.
    deaths = ["named", "write", "named", "replace", "named", "write", "named", "named", "random", "random"]
    command = [sys.executable, train_and_die.__file__, tmp_path, "--experiment", "two_stage:noisy", "--deaths", *deaths]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-8000:]
    assert result.stdout.count("killed (named)") == 5
    assert result.stdout.rstrip().endswith("killed: finished")
    checkpoints = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("undisturbed", "killed")]
    for name in ("state_dict", "optimizer_states", "epoch", "global_step"):
        assert_equal(*(checkpoint[name] for checkpoint in checkpoints))
    assert_equal(*(checkpoint["callbacks"]["TwoStageQAT"] for checkpoint in checkpoints))
    # A killed process's steps are trained again: to the same losses.
    undisturbed, killed = (
        set((tmp_path / run / "losses-0.txt").read_text().splitlines()) for run in ("undisturbed", "killed")
    )
    assert undisturbed == killed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("native")
    fit(SmallModule(), two_stage.callback(), directory=directory)
    return directory / "epoch=4.ckpt"


def test_another_structure_is_refused(checkpoint):
    targets = TARGETS | {"layers.0.weight": pb.BlockDiagonal(4)}
    with pytest.raises(pb.StructureError, match=r"blocks=2.*blocks=4"):
        fit(SmallModule(), pb.TwoStageQAT(targets), resume=checkpoint)


@pytest.mark.parametrize("scheme", ["torchao", "brevitas"])
def test_another_scheme_is_refused(checkpoint, scheme):
    message = f"trained with scheme='native'; got scheme='{scheme}'"
    with pytest.raises(MisconfigurationException, match=message):
        fit(SmallModule(), two_stage.callback(scheme), resume=checkpoint)
    callback = two_stage.callback(scheme)
    for _ in range(2):  # also after a run that failed
        with pytest.raises(MisconfigurationException, match=message):
            train_and_die.quiet_trainer(callbacks=[callback]).test(SmallModule(), ckpt_path=checkpoint)


@pytest.mark.parametrize("is_prepared", [False, True], ids=["float", "prepared by hand"])
def test_a_checkpoint_of_a_training_without_the_callback_is_refused(tmp_path, is_prepared):
    trainer = train_and_die.quiet_trainer(max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, filename="other")])
    module = SmallModule()
    trainer.fit(pb.prepare(module, TARGETS) if is_prepared else module)
    with pytest.raises(MisconfigurationException, match="trained without TwoStageQAT"):
        fit(SmallModule(), two_stage.callback(), resume=tmp_path / "other.ckpt")


def test_what_a_checkpoint_says_is_checked_where_no_state_dict_is_read():
    """FSDP2 loads parameters one by one."""
    said = {"scheme": "native", "structures": {"layer.weight": "{}"}}
    check_checkpoint(said, "native", said["structures"])
    with pytest.raises(MisconfigurationException, match="trained with scheme='native'; got scheme='torchao'"):
        check_checkpoint(said, "torchao", said["structures"])
    with pytest.raises(MisconfigurationException, match=r"'layer.weight' with the structure .*, this model with None"):
        check_checkpoint(said, "native", {})


def test_a_longer_training_goes_on_in_its_stage(tmp_path):
    fit(SmallModule(), two_stage.callback("native", 0, 0.5), directory=tmp_path, max_epochs=2)
    callback = two_stage.callback("native", 0, 0.5)
    assert fit(SmallModule(), callback, resume=tmp_path / "epoch=1.ckpt", max_epochs=8).stages == [C] * 12
