"""TwoStageQAT in real trainings: what each stage moves, when stages switch, and what checkpoints bring back."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import train_and_die
import two_stage
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset
from two_stage import EPOCHS, TARGETS, SmallModule

import pibinn_plugin as pb
from lightning_modules.checkpointing import AtomicCheckpointIO, RandomState
from pibinn_plugin.workflow import SCHEMES, quantized_weights

REPOSITORY = Path(__file__).parents[2]
W, S, C = "warm_up", "signs", "scale"

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The dirpath has changed",
        "Be aware that when using `ckpt_path`, callbacks used",
        "You're resuming from a checkpoint that ended before",
        "The checkpoint .* holds no random state",
        "(?s).*JSONARGPARSE_DEPRECATION_WARNINGS",
        "(?s).*was deprecated in v4.49.0",
    )
]


class Diary(pl.Callback):
    """What the callbacks before it have made of each step and epoch."""

    def __init__(self):
        self.stages, self.losses, self.scales, self.metrics, self.states = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for callback in trainer.callbacks:
            if isinstance(callback, pb.TwoStageQAT):
                self.stages.append(callback.stage.value)
                self.scales.append(pb.global_scale(pl_module)().item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append(state_of(pl_module))
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def state_of(module):
    """Parameters and latents under the names they had before the module was prepared, and λ."""
    weights = {id(weight.latent): weight.name for weight in quantized_weights(module)}
    return {weights.get(id(each), name): each.detach().clone() for name, each in module.named_parameters()}


def fit(module, callback, *others, resume=None, directory=None, trainer=None, **arguments):
    diary = Diary()
    callbacks = [RandomState(), callback, *others, diary]
    if directory is not None:
        callbacks.append(ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1))
        arguments["plugins"] = [AtomicCheckpointIO()]
    arguments.setdefault("enable_checkpointing", directory is not None)
    if not arguments.keys() & {"max_steps", "max_time"}:
        arguments.setdefault("max_epochs", EPOCHS)
    diary.trainer = train_and_die.quiet_trainer(callbacks=callbacks, **arguments)
    pl.seed_everything(0, verbose=False)
    diary.trainer.fit(module, ckpt_path=resume)
    return diary


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


def assert_equal(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


# --------------------------------------------------------------------------------------------------------- the stages


class PendingGradients(pl.Callback):
    """Gradients of frozen latents, from wherever."""

    def on_after_backward(self, trainer, pl_module):
        for weight in quantized_weights(pl_module):
            if not weight.latent.requires_grad:
                weight.latent.grad = torch.ones_like(weight.latent)


@pytest.mark.parametrize("others", [[], [PendingGradients()]], ids=["", "pending gradients"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_stage_moves_its_own_parameters(scheme, optimizer, others):
    module = SmallModule(optimizer)
    diary = fit(module, two_stage.callback(scheme), *others)
    floats = {"gain", "layers.0.bias", "layers.2.bias"}
    changes = [moved(before, after) for before, after in zip(diary.states, diary.states[1:], strict=False)]
    for change, epoch in zip(changes, range(1, EPOCHS), strict=True):
        assert floats <= change
        assert change & TARGETS.keys() == (set() if epoch >= 4 else TARGETS.keys())
        assert epoch < 2 or "pibinn_scale.value" in change
    # The optimizer would move them: it has momenta of every latent.
    state = diary.trainer.optimizers[0].state
    if optimizer != "lbfgs":
        momentum = {"adam": "exp_avg", "sgd": "momentum_buffer"}[optimizer]
        assert all(state[weight.latent][momentum].abs().max() > 0 for weight in quantized_weights(module))


class SanityLoss(pl.Callback):
    def on_sanity_check_end(self, trainer, pl_module):
        self.loss = trainer.callback_metrics["val/loss"].item()


class FloatModule(SmallModule):
    """The network of the warm-up: no quantizers, zeros outside the structure."""

    def __init__(self):
        super().__init__("sgd")
        self.mask = TARGETS["layers.0.weight"].mask((8, 8))
        parametrize.register_parametrization(self.layers[0], "weight", Masked(self.mask))


class Masked(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


def test_the_warm_up_trains_the_float_network():
    diaries = []
    for module, callback in ((SmallModule("sgd"), two_stage.callback()), (FloatModule(), pl.Callback())):
        sanity = SanityLoss()
        diaries.append((fit(module, callback, sanity, max_epochs=2), sanity.loss))
    (diary, sanity_loss), (expected, expected_sanity_loss) = diaries
    assert diary.stages == [W] * 4
    assert diary.losses == pytest.approx(expected.losses, abs=1e-12)
    assert [metrics["val/loss"] for metrics in diary.metrics] == pytest.approx(
        [metrics["val/loss"] for metrics in expected.metrics], abs=1e-12
    )
    assert sanity_loss == pytest.approx(expected_sanity_loss, abs=1e-12)
    with pytest.raises(pb.PIBiNNError, match="float warm-up"):
        pb.convert(diary.trainer.lightning_module)


class OptimizerSteps(pl.Callback):
    """How many steps Adam has made with λ, after each step."""

    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts.append(int(trainer.optimizers[0].state[pb.global_scale(pl_module).value]["step"]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scale_starts_anew_when_the_warm_up_ends_and_then_only(scheme):
    steps = OptimizerSteps()
    diary = fit(SmallModule(), two_stage.callback(scheme), steps)
    warmed_up = diary.states[1]
    mask = TARGETS["layers.0.weight"].mask((8, 8))
    latents = [warmed_up["layers.0.weight"][mask], warmed_up["layers.2.weight"], warmed_up["layers.4.weight"]]
    assert diary.scales[4] == pytest.approx(torch.cat([each.flatten() for each in latents]).abs().mean().item())
    assert diary.scales[4] != diary.scales[3]
    assert steps.counts == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]
    assert diary.scales[8] == diary.states[3]["pibinn_scale.value"].abs().item()


# ---------------------------------------------------------------------------------------------------------- switching


@pytest.mark.parametrize(
    ("starts", "arguments", "stages"),
    [
        ((2, 4), {"max_epochs": 6}, [W] * 4 + [S] * 4 + [C] * 4),
        ((0, 0.75), {"max_epochs": 4}, [S] * 6 + [C] * 2),
        ((0.25, 0.6), {"max_epochs": 3}, [W] * 2 + [S] * 2 + [C] * 2),
        ((0.25, 0.75), {"max_steps": 4}, [W, S, S, C]),
        ((0.25, 0.75), {"max_epochs": 9, "max_steps": 4}, [W, S, S, C]),
        ((0.25, 0.5), {"max_epochs": 4, "accumulate_grad_batches": 2}, [W] * 2 + [S] * 2 + [C] * 4),
        ((1, 0.5), {"max_epochs": 4}, [W] * 2 + [S] * 2 + [C] * 4),
        ((1, 1), {"max_epochs": 2}, [W] * 2 + [C] * 2),
        ((0, 0), {"max_epochs": 1}, [C] * 2),
        ((0.0, 1.0), {"max_epochs": 2}, [S] * 4),
        ((0, 9), {"max_time": "00:00:10:00", "limit_train_batches": 1, "max_epochs": 2}, [S] * 2),
    ],
)
def test_stages_switch_on_time(starts, arguments, stages):
    assert fit(SmallModule(), two_stage.callback("native", *starts), **arguments).stages == stages


class StreamingModule(SmallModule):
    def train_dataloader(self):
        samples = list(super().train_dataloader().dataset)

        class Samples(IterableDataset):
            def __iter__(self):
                return iter(samples)

        return DataLoader(Samples(), batch_size=8)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (SmallModule, {"max_epochs": -1}),
        (StreamingModule, {"max_epochs": 3}),
        (two_stage.ManualModule, {"max_epochs": 3}),
    ],
)
def test_a_fraction_of_an_unknown_length_is_refused(module, arguments):
    with pytest.raises(MisconfigurationException, match="whose length is unknown"):
        fit(module(), two_stage.callback("native", 0, 0.75), **arguments)


def test_manual_optimization_counts_the_steps_of_all_optimizers():
    diary = fit(two_stage.ManualModule(), two_stage.callback("native", 0.25, 0.75), max_steps=16)
    assert diary.stages == [W] * 2 + [S] * 4 + [C] * 2
    assert moved(diary.states[2], diary.states[3]).isdisjoint(TARGETS)


def test_streams_train_with_epochs_or_with_a_number_of_steps():
    assert fit(StreamingModule(), two_stage.callback("native", 0, 1), max_epochs=2).stages == [S, S, C, C]
    assert fit(StreamingModule(), two_stage.callback("native", 0, 0.75), max_steps=4).stages == [S, S, S, C]


@pytest.mark.parametrize("starts", [(-1, 2), (0, 1.5), (3, 2), (0.5, 0.25), (-0.1, 1)])
def test_starts_without_a_meaning_are_refused(starts):
    with pytest.raises(MisconfigurationException, match="stage"):
        two_stage.callback("native", *starts)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_every_epoch_logs_scale_flips_and_stage():
    diary = fit(SmallModule(), two_stage.callback())
    masks = {"layers.0.weight": TARGETS["layers.0.weight"].mask((8, 8))}
    for epoch, (metrics, state) in enumerate(zip(diary.metrics, diary.states, strict=True)):
        assert metrics["qat/stage"] == [0, 0, 1, 1, 2, 2][epoch]
        assert metrics["qat/scale"] == state["pibinn_scale.value"].abs().item()
        if epoch > 0:
            before = diary.states[epoch - 1]
            flips = [((before[name] >= 0) != (state[name] >= 0))[masks.get(name, ...)].flatten() for name in TARGETS]
            assert metrics["qat/flipped"] == pytest.approx(torch.cat(flips).double().mean().item())
    assert any(0 < metrics["qat/flipped"] < 1 for metrics in diary.metrics[2:4])


# -------------------------------------------------------------------------------------------------------- checkpoints


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


def test_a_checkpoint_of_a_float_training_is_refused(tmp_path):
    trainer = train_and_die.quiet_trainer(max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, filename="float")])
    trainer.fit(SmallModule())
    with pytest.raises(MisconfigurationException, match="trained without TwoStageQAT"):
        fit(SmallModule(), two_stage.callback(), resume=tmp_path / "float.ckpt")


def test_a_longer_training_goes_on_in_its_stage(tmp_path):
    fit(SmallModule(), two_stage.callback("native", 0, 0.5), directory=tmp_path, max_epochs=2)
    callback = two_stage.callback("native", 0, 0.5)
    assert fit(SmallModule(), callback, resume=tmp_path / "epoch=1.ckpt", max_epochs=8).stages == [C] * 12


# ---------------------------------------------------------------------------------------------------- more than a fit


def test_one_callback_trains_one_module_after_another():
    callback = two_stage.callback()
    first, second = fit(SmallModule(), callback), fit(SmallModule(), callback)
    assert first.stages == second.stages
    assert first.losses == second.losses


def test_a_new_training_of_a_trained_module_begins_with_stage_one():
    module, callback = SmallModule(), two_stage.callback()
    fit(module, callback)
    again = fit(module, callback)
    assert again.stages == [W] * 4 + [S] * 4 + [C] * 4
    assert moved(again.states[0], again.states[3]) >= TARGETS.keys()
    assert moved(again.states[3], again.states[5]).isdisjoint(TARGETS)


def test_a_training_goes_on_with_the_same_trainer():
    whole = fit(SmallModule(), two_stage.callback())
    halves = fit(SmallModule(), two_stage.callback(), max_epochs=2)
    halves.trainer.fit_loop.max_epochs = EPOCHS
    halves.trainer.fit(halves.trainer.lightning_module)
    assert halves.stages == whole.stages
    assert halves.scales[:5] == whole.scales[:5]  # λ started anew; the optimizer did too, which is Lightning's way


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_trained_module_stays_usable_and_converts(scheme):
    module = SmallModule()
    assert type(module).forward is SmallModule.forward
    diary = fit(module, two_stage.callback(scheme))
    assert diary.trainer.lightning_module is module
    assert "forward" not in vars(module)
    x = torch.randn(5, 8, dtype=torch.float64)
    before = module(x)
    packed = pb.convert(module)
    torch.testing.assert_close(packed(x), before)
    assert torch.equal(module(x), before)
    assert pb.global_scale(packed)() == pb.global_scale(module)()
    (tested,) = train_and_die.quiet_trainer().test(packed, verbose=False)
    assert tested["test/loss"] == pytest.approx(diary.metrics[-1]["val/loss"])
    # The hook that checks checkpoints is gone: packed modules have state dicts of their own.
    packed.load_state_dict(packed.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_module_prepared_by_hand_trains_as_well(scheme):
    module = SmallModule()
    pb.prepare(module, TARGETS, scheme)
    assert fit(module, two_stage.callback(scheme)).losses == fit(SmallModule(), two_stage.callback(scheme)).losses


@pytest.mark.parametrize(
    ("targets", "scheme", "message"),
    [
        (TARGETS | {"layers.0.weight": pb.BlockDiagonal(4)}, "native", "as BlockDiagonal.*asks for BlockDiagonal"),
        (TARGETS, "torchao", "scheme='native'; the callback asks for .* in scheme='torchao'"),
        ({"layers.0.weight": None}, "native", "which no target matches"),
        (TARGETS | {"layers.0.bias": None}, "native", "matches none of them"),
    ],
)
def test_a_module_prepared_otherwise_is_refused(targets, scheme, message):
    module = SmallModule()
    pb.prepare(module, TARGETS)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, pb.TwoStageQAT(targets, scheme))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_with_flat_parameters_are_refused(strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__} keeps parameters in flat buffers"):
        two_stage.callback().setup(trainer, SmallModule(), "fit")


# ------------------------------------------------------------------------------------------------------- command line

CONFIG = """
trainer:
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  accelerator: cpu
  callbacks:
    - class_path: pibinn_plugin.TwoStageQAT
      init_args:
        targets:
          layers.0.weight: {class_path: pibinn_plugin.BlockDiagonal, init_args: {rows: [2, 6], columns: [4, 4]}}
          layers.2.weight: null
          layers.4.weight:
            class_path: pibinn_plugin.Mask
            init_args: {pattern: [[1,1,0,0,0,0,0,0], [0,1,1,0,0,0,0,0], [0,0,1,1,0,0,0,0], [0,0,0,1,1,0,0,1]]}
        scheme: torchao
        sign_stage_start: 1
        scale_stage_start: 0.5
"""


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


def callback_from(config, directory):
    path = directory / "config.yaml"
    path.write_text(config)
    cli = LightningCLI(SmallModule, args=["--config", str(path)], run=False, save_config_callback=None)
    return cli, next(each for each in cli.trainer.callbacks if isinstance(each, pb.TwoStageQAT))


def test_a_config_names_every_argument_and_survives_printing(tmp_path):
    printed = io.StringIO()
    (tmp_path / "config.yaml").write_text(CONFIG)
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
        LightningCLI(SmallModule, args=["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    once_printed = {key: yaml.safe_load(printed.getvalue())[key] for key in ("trainer", "seed_everything")}
    for config in (CONFIG, yaml.safe_dump(once_printed)):
        cli, callback = callback_from(config, tmp_path)
        assert callback.targets == {
            "layers.0.weight": pb.BlockDiagonal(rows=(2, 6), columns=(4, 4)),
            "layers.2.weight": None,
            "layers.4.weight": pb.Mask(torch.eye(4, 8) + torch.eye(4, 8).roll(1, 1) + corner()),
        }
        starts = (callback.sign_stage_start, callback.scale_stage_start)
        assert (callback.scheme, *starts) == ("torchao", 1, 0.5)
        assert [type(start) for start in starts] == [int, float]
    cli.trainer.fit(cli.model)
    assert callback.stage == C


def corner():
    pattern = torch.zeros(4, 8)
    pattern[3, 7] = 1
    return pattern


def test_a_config_with_a_bad_structure_is_refused(tmp_path):
    bad = CONFIG.replace("pibinn_plugin.Mask", "pibinn_plugin.NoSuchThing")
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit):
        callback_from(bad, tmp_path)
    assert "NoSuchThing" in errors.getvalue()
