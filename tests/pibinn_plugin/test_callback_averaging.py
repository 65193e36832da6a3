"""Averages of a one-bit network (Lightning's, and one by hand) are one-bit networks, in any order of callbacks."""

import pytest
import pytorch_lightning as pl
import torch
import two_stage
import yaml
from fit_two_stage import assert_equal, fit, state_of
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.callbacks.weight_averaging import EMAWeightAveraging
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim.swa_utils import AveragedModel
from two_stage import EPOCHS, TARGETS, SmallModule

import pibinn_plugin as pb
from pibinn_plugin.schemes import SCHEMES
from pibinn_plugin.workflow import quantized_weights

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Be aware that when using `ckpt_path`",
        "You're resuming from",
        "Swapping scheduler",
        "The checkpoint",
    )
]


class Run(pl.Callback):
    """The run's own λ after each step, and its signs after each epoch."""

    def __init__(self):
        self.scales, self.signs = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scales.append(pb.global_scale(pl_module).value.item())

    def on_train_epoch_start(self, trainer, pl_module):
        self.signs.append(bits_of(pl_module))


class Evaluated(pl.Callback):
    """The weights that each validation reads."""

    def __init__(self):
        self.weights = []

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            weights = [(weight.quantizer.structural(weight.module.weight)) for weight in quantized_weights(pl_module)]
            self.weights.append((pb.global_scale(pl_module)().item(), weights))


def bits_of(module):
    return torch.cat([weight.packed.bits for weight in quantized_weights(module)])


def in_order(average_first, average, callback):
    return (average, callback) if average_first else (callback, average)


@pytest.mark.parametrize("average_first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_averaged_network_has_the_signs_of_the_run_and_the_mean_scale(scheme, average_first, tmp_path):
    average, callback, run, evaluated = WeightAveraging(), two_stage.callback(scheme, 0, 3), Run(), Evaluated()
    first, second = in_order(average_first, average, callback)
    module = SmallModule()
    diary = fit(module, first, second, run, evaluated, directory=tmp_path)
    for scale, weights in evaluated.weights:  # one-bit networks in both stages
        for weight in weights:
            assert torch.equal(weight.abs(), torch.full_like(weight, scale))
    frozen = run.signs[-1]
    assert not torch.equal(run.signs[0], frozen)
    assert torch.equal(bits_of(module), frozen)
    # Lightning's own average begins with a copy, and takes each step's value as one more.
    means = torch.tensor(run.scales, dtype=torch.float64).cumsum(0) / torch.arange(1, len(run.scales) + 1)
    assert pb.global_scale(module)().item() == pytest.approx(means[-1].item(), abs=1e-12)
    assert evaluated.weights[-1][0] == pytest.approx(means[-1].item(), abs=1e-12)
    # What is saved is what was evaluated, also without the callbacks.
    for epoch in (1, EPOCHS - 1):
        fresh = pb.prepare(SmallModule(), TARGETS, scheme)
        fresh.load_state_dict(torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"])
        trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_model_summary=False)
        (tested,) = trainer.test(fresh, verbose=False)
        assert tested["test/loss"] == pytest.approx(diary.metrics[epoch]["val/loss"], abs=1e-12)
        assert epoch < 3 or torch.equal(bits_of(fresh), frozen)


class AtTheSwitch(pl.Callback):
    """The bits of the averaged latents just before stage 2, and those of the average one epoch later."""

    def on_train_epoch_start(self, trainer, pl_module):
        average = next(each for each in trainer.callbacks if isinstance(each, WeightAveraging))
        if trainer.current_epoch == 3:
            self.averaged, self.own = bits_of(average._average_model.module), bits_of(pl_module)
        elif trainer.current_epoch == 4:
            self.later = bits_of(average._average_model.module)


class Late(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 8


@pytest.mark.parametrize("average", [WeightAveraging, Late])
def test_the_signs_are_decided_once(average):
    alone, beside, switch = Run(), Run(), AtTheSwitch()
    fit(SmallModule(), two_stage.callback("native", 0, 3), alone)
    fit(module := SmallModule(), switch, average(), two_stage.callback("native", 0, 3), beside)
    assert beside.scales[:6] == alone.scales[:6]  # until then averaging does not change the run
    assert_equal(beside.signs[:3], alone.signs[:3])
    assert not torch.equal(switch.averaged, switch.own)
    decided = switch.own if average is Late else switch.averaged
    assert torch.equal(bits_of(module), decided)
    assert torch.equal(beside.signs[-1], decided)
    assert torch.equal(switch.later, decided)


@pytest.mark.parametrize("average_first", [False, True], ids=["after", "before"])
def test_the_warm_up_is_averaged_as_float_weights(average_first, tmp_path):
    first, second = in_order(average_first, EMAWeightAveraging(decay=0.5), two_stage.callback("native", 2, 4))
    run = Run()
    diary = fit(SmallModule(), first, second, run, directory=tmp_path)
    for epoch, stage in ((1, "warm_up"), (2, "signs"), (5, "scale")):
        fresh = pb.prepare(SmallModule(), TARGETS)
        fresh.load_state_dict(torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"])
        held = quantized_weights(fresh)
        assert all(weight.quantizer.enabled == (stage != "warm_up") for weight in held)
        assert all(weight.is_frozen == (stage == "scale") for weight in held)
        if stage == "signs":  # λ of the warm-up, which meant nothing, is no part of the average
            since = [diary.scales[4], *run.scales[4:6]]
            assert min(since) <= pb.global_scale(fresh)().item() <= max(since)
            assert not min(since) <= diary.scales[0] <= max(since)


@pytest.mark.parametrize("average_first", [False, True], ids=["after", "before"])
def test_a_resumed_average_goes_on_bit_for_bit(average_first, tmp_path):
    def callbacks():
        return in_order(average_first, EMAWeightAveraging(decay=0.7), two_stage.callback("torchao", 2, 4))

    whole = SmallModule()
    fit(whole, *callbacks(), directory=tmp_path)
    for epoch in range(EPOCHS - 1):
        resumed = SmallModule()
        fit(resumed, *callbacks(), resume=tmp_path / f"epoch={epoch}.ckpt")
        assert_equal(state_of(resumed), state_of(whole))


@pytest.mark.parametrize("average_first", [False, True], ids=["after", "before"])
def test_stochastic_weight_averaging(average_first):
    average = StochasticWeightAveraging(0.01, swa_epoch_start=2)
    run, module = Run(), SmallModule("sgd")
    first, second = in_order(average_first, average, two_stage.callback("native", 0, 4))
    fit(module, first, second, run)
    assert torch.equal(bits_of(module), run.signs[-1])
    assert all(weight.is_frozen for weight in quantized_weights(module))
    pb.convert(module)


CONFIG = """
trainer:
  max_epochs: 4
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks:
  - class_path: pytorch_lightning.callbacks.EMAWeightAveraging
    init_args: {decay: 0.5}
  - class_path: pibinn_plugin.TwoStageQAT
    init_args:
      targets: {layers.0.weight: null}
      scale_stage_start: 2
"""


def test_from_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(SmallModule, args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None)
    assert yaml.safe_load(CONFIG)["trainer"]["callbacks"][0]["class_path"].endswith("EMAWeightAveraging")
    (weight,) = quantized_weights(cli.model)
    assert weight.is_frozen


class AveragesItsLayers(SmallModule):
    """An average by hand, made before the layers are prepared."""

    def __init__(self):
        super().__init__()
        self.average = AveragedModel(self.layers)


def test_an_average_of_unprepared_layers_is_refused():
    with pytest.raises(MisconfigurationException, match="average averages a Sequential that has targets"):
        fit(AveragesItsLayers(), two_stage.callback())


def test_an_average_by_hand_may_have_targets_too():
    targets = TARGETS | {f"average.module.{name.removeprefix('layers.')}": each for name, each in TARGETS.items()}

    class Averages(AveragesItsLayers):
        def on_train_batch_end(self, *_):
            self.average.update_parameters(self.layers)

    module = Averages()
    fit(module, pb.TwoStageQAT(targets, scale_stage_start=3))
    assert len(quantized_weights(module)) == 6
    assert all(weight.is_frozen for weight in quantized_weights(module))
