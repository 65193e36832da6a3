"""TwoStageQAT with what else a Trainer does: each a training in a real Trainer."""

import pytest
import pytorch_lightning as pl
import torch
import train_and_die
import two_stage
from fit_two_stage import C, S, W, assert_equal, fit, moved, state_of
from pytorch_lightning.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from two_stage import EPOCHS, TARGETS, SmallModule

import pibinn_plugin as pb
from pibinn_plugin.schemes import SCHEMES
from pibinn_plugin.workflow import quantized_weights

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("training has ended before", "Be aware that when using `ckpt_path`", "You're resuming", "The check")
]
FLOATS = {"gain", "layers.0.bias", "layers.2.bias"}


def assert_two_stages(diary, epochs=EPOCHS):
    """What holds in every training: its stages in order, and in the last only λ and floats move."""
    assert diary.stages == sorted(diary.stages, key=[W, S, C].index)
    assert diary.stages[-1] == C
    change = moved(diary.states[-2], diary.states[-1])
    assert change.isdisjoint(TARGETS)
    assert {"pibinn_scale.value", "gain"} <= change
    assert all(weight.latent.requires_grad for weight in quantized_weights(diary.trainer.lightning_module))
    pb.convert(diary.trainer.lightning_module)


# ------------------------------------------------------------------------------------------- arguments of the Trainer


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"limit_train_batches": 1},
        {"overfit_batches": 1},
        {"detect_anomaly": True},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"barebones": False, "num_sanity_val_steps": 0},
    ],
    ids=str,
)
def test_arguments_of_the_trainer(arguments):
    diary = fit(SmallModule(), two_stage.callback(), **arguments)
    per_epoch = 1 if {"limit_train_batches", "overfit_batches"} & arguments.keys() else 2
    assert diary.stages == [W] * 2 * per_epoch + [S] * 2 * per_epoch + [C] * 2 * per_epoch
    assert_two_stages(diary)


class AnyPrecision(SmallModule):
    def __init__(self):
        super().__init__("sgd")  # the epsilon of Adam is 0 in float16
        self.float()

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self(x.to(self.gain.dtype)).float(), y.float())


@pytest.mark.parametrize("precision", ["32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_precisions(scheme, precision):
    module = AnyPrecision()
    diary = fit(module, two_stage.callback(scheme), precision=precision)
    assert diary.stages == [W] * 4 + [S] * 4 + [C] * 4
    assert moved(diary.states[4], diary.states[5]).isdisjoint(TARGETS)
    packed = pb.convert(module)
    expected = [weight.packed.bits for weight in quantized_weights(module)]
    assert_equal([weight.packed.bits for weight in pb.weights.packed_weights(packed)], expected)


def test_fast_dev_run():
    diary = fit(SmallModule(), two_stage.callback("native", 0, 0.5), fast_dev_run=True)
    assert diary.stages == [S]


def test_max_time_needs_no_number_of_epochs_but_a_fraction_does():
    arguments = {"max_time": {"hours": 1}, "max_epochs": None, "limit_train_batches": 1}

    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 3

    assert fit(SmallModule(), two_stage.callback("native", 1, 2), Stops(), **arguments).stages == [W, S, C, C]
    with pytest.raises(MisconfigurationException, match=r"only max_time.*give the start as an epoch"):
        fit(SmallModule(), two_stage.callback("native", 0, 0.75), Stops(), **arguments)


# --------------------------------------------------------------------------------------------------- other callbacks


def test_early_stopping_before_stage_2_says_so(recwarn):
    stopping = EarlyStopping("val/loss", mode="max", patience=1)  # the loss falls: it stops early
    diary = fit(SmallModule("sgd"), two_stage.callback("native", 0, 5), stopping)
    assert diary.stages[-1] == S
    assert any("training has ended before stage 2" in str(each.message) for each in recwarn.list)
    pb.convert(diary.trainer.lightning_module)


def test_a_training_that_is_asked_for_no_stage_2_ends_without_a_word(recwarn):
    diary = fit(SmallModule("sgd"), two_stage.callback("native", 0.0, 1.0))
    assert diary.stages[-1] == S
    assert not any("stage 2" in str(each.message) for each in recwarn.list)


def test_the_best_checkpoint_may_be_one_of_the_warm_up_and_says_so(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="qat/stage", mode="min", save_top_k=1)
    fit(SmallModule(), two_stage.callback("native", 2, 4), best, enable_checkpointing=True)
    for evaluate in ("test", "validate"):
        module = SmallModule()
        trainer = train_and_die.quiet_trainer(callbacks=[two_stage.callback()])
        with pytest.warns(UserWarning, match="these are the weights of the float warm-up"):
            getattr(trainer, evaluate)(module, ckpt_path=best.best_model_path, verbose=False)
    with pytest.raises(pb.PIBiNNError, match="float warm-up"):
        pb.convert(module)
    assert torch.load(best.best_model_path)["callbacks"]["TwoStageQAT"]["stage"] == W


def test_the_best_checkpoint_of_a_stage(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=2)
    diary = fit(SmallModule(), two_stage.callback("native", 0, 1), best, enable_checkpointing=True)
    module = SmallModule()
    trainer = train_and_die.quiet_trainer(callbacks=[two_stage.callback("native", 0, 1)])
    (tested,) = trainer.test(module, ckpt_path=best.best_model_path, verbose=False)
    assert tested["test/loss"] == pytest.approx(min(metrics["val/loss"] for metrics in diary.metrics))


def frozen_by_a_user():
    module = SmallModule()
    module.layers[0].weight.requires_grad_(False)
    return module


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("start", [1, 0.5, 1.0])
def test_what_the_user_froze_stays_frozen(scheme, start):
    module = frozen_by_a_user()
    before = module.layers[0].weight.detach().clone()
    callback = two_stage.callback(scheme, 0, start)
    for _ in range(2):  # two fits in a row
        diary = fit(module, callback)
        assert torch.equal(state_of(module)["layers.0.weight"], before)
        trainable = {weight.name: weight.latent.requires_grad for weight in quantized_weights(module)}
        assert trainable == {"layers.0.weight": False, "layers.2.weight": True, "layers.4.weight": True}
        assert "layers.2.weight" in moved(diary.states[0], diary.states[-1]) or start == 1
    again = fit(module, pb.TwoStageQAT(TARGETS, scheme))
    assert torch.equal(again.states[-1]["layers.0.weight"], before)
    assert "layers.2.weight" in moved(again.states[0], again.states[-1])


def test_an_error_in_training_leaves_the_module_as_trainable_as_it_was():
    class Fails(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                raise RuntimeError("on purpose")

    module = frozen_by_a_user()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, two_stage.callback(), Fails())
    assert [weight.latent.requires_grad for weight in quantized_weights(module)] == [False, True, True]


class BackboneModule(SmallModule):
    def __init__(self):
        super().__init__()
        self.backbone = self.layers[:2]


@pytest.mark.parametrize("first", [False, True])
def test_backbone_finetuning_thaws_nothing_of_stage_2(first):
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=4, lambda_func=lambda epoch: 1.0, verbose=False)
    callbacks = [finetuning, two_stage.callback("native", 0, 3)]
    module = BackboneModule()
    module.optimizer = "sgd"
    diary = fit(module, *(callbacks if first else callbacks[::-1]))
    states = [{name.removeprefix("backbone."): each for name, each in state.items()} for state in diary.states]
    assert not moved(states[0], states[-1]) & {"layers.0.weight"}  # frozen by the callback, then by stage 2
    assert moved(states[2], states[-1]).isdisjoint(TARGETS)
    assert "layers.0.bias" in moved(states[3], states[-1])  # thawed by the callback
    assert "layers.0.bias" not in moved(states[0], states[3])


@pytest.mark.parametrize("method", ["lr_find", "scale_batch_size"])
def test_the_tuner(method, tmp_path):
    class Tunable(SmallModule):
        def __init__(self):
            super().__init__()
            self.learning_rate, self.batch_size = 0.01, 2

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

        def train_dataloader(self):
            return DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size)

    def trained(tune):
        module = Tunable()
        arguments = {"max_epochs": 4, "enable_checkpointing": False, "default_root_dir": tmp_path}
        trainer = train_and_die.quiet_trainer(callbacks=[callback := two_stage.callback("native", 1, 2)], **arguments)
        if tune == "lr_find":
            Tuner(trainer).lr_find(module, num_training=8, min_lr=1e-3, max_lr=1e-2, update_attr=False)
        elif tune == "scale_batch_size":
            Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=3)
            assert module.batch_size > 2
            module.batch_size = 2
        trainer.fit(module)
        assert callback.stage == C
        return module

    assert_equal(state_of(trained(method)), state_of(trained(None)))


# ------------------------------------------------------------------------------------------------ kinds of modules


class BuiltLate(SmallModule):
    """Its layers are made in ``configure_model``."""

    def __init__(self):
        super().__init__()
        self.layers = None

    def configure_model(self):
        if self.layers is None:
            self.layers = SmallModule().layers


class BuiltAnew(BuiltLate):
    def configure_model(self):
        self.layers = SmallModule().layers


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_made_in_configure_model(scheme, tmp_path):
    diary = fit(BuiltLate(), two_stage.callback(scheme), directory=tmp_path)
    expected = fit(SmallModule(), two_stage.callback(scheme))
    assert diary.losses == expected.losses
    resumed = fit(BuiltLate(), two_stage.callback(scheme), resume=tmp_path / "epoch=3.ckpt")
    assert_equal(resumed.states[-1], expected.states[-1])


def test_configure_model_that_makes_layers_anew_is_refused():
    with pytest.raises(MisconfigurationException, match="has made its layers anew"):
        fit(BuiltAnew(), two_stage.callback())


class ManyOptimizers(two_stage.ManualModule):
    """One each for latents, λ and floats, stepped in turn."""

    def configure_optimizers(self):
        scale = list(self.pibinn_scale.parameters())
        latents = [weight.latent for weight in quantized_weights(self)]
        known = {id(parameter) for parameter in (*scale, *latents)}
        floats = [parameter for parameter in self.parameters() if id(parameter) not in known]
        return [
            torch.optim.SGD(latents, lr=0.1, momentum=0.9),
            torch.optim.Adam(scale, lr=0.01),
            torch.optim.RMSprop(floats, lr=0.01),
        ]


def test_several_optimizers():
    diary = fit(ManyOptimizers(), two_stage.callback("native", 2, 4))
    assert diary.stages == [W] * 4 + [S] * 4 + [C] * 4
    assert_two_stages(diary)


class ForgetsTheScale(SmallModule):
    def configure_optimizers(self):
        return torch.optim.Adam([*self.layers.parameters(), self.gain])


def test_a_scale_in_no_optimizer_is_refused_before_training():
    with pytest.raises(
        MisconfigurationException, match=r"'pibinn_scale.value' is in no optimizer.*self.parameters\(\)"
    ):
        fit(ForgetsTheScale(), two_stage.callback())
    module = pb.prepare(ForgetsTheScale(), TARGETS)
    module.pibinn_scale.value.requires_grad_(False)  # on purpose
    diary = fit(module, two_stage.callback("native", 0, 4))
    assert set(diary.scales) == {diary.scales[0]}


class ForgetsALayer(SmallModule):
    def configure_optimizers(self):
        return torch.optim.Adam([*self.layers[2:].parameters(), self.gain, self.pibinn_scale.value])


def test_latents_in_no_optimizer_are_named():
    with pytest.warns(UserWarning, match=r"\['layers.0.weight'\] are in no optimizer"):
        fit(ForgetsALayer(), two_stage.callback())


def test_a_compiled_module():
    module = SmallModule()
    module.compile(backend="eager")
    diary = fit(module, two_stage.callback(), limit_val_batches=0)
    expected = fit(SmallModule(), two_stage.callback(), limit_val_batches=0)
    assert diary.losses == pytest.approx(expected.losses, abs=1e-9)
    assert_two_stages(diary)


def test_a_prepared_module_is_trained_by_a_new_process():
    module = pb.prepare(SmallModule(), TARGETS)
    fit(module, two_stage.callback(), strategy="ddp_spawn", devices=1)
    assert_equal(state_of(module), fit(SmallModule(), two_stage.callback()).states[-1])
    assert all(weight.is_frozen for weight in quantized_weights(module))
    pb.convert(module)


def test_two_callbacks_are_refused():
    halves = [{name: TARGETS[name]} for name in ("layers.0.weight", "layers.2.weight")]
    with pytest.raises(MisconfigurationException, match=r"has 2 TwoStageQAT.*name the targets of all in one"):
        fit(SmallModule(), pb.TwoStageQAT(halves[0]), pb.TwoStageQAT(halves[1]))


def test_predictions(tmp_path):
    module = SmallModule()
    fit(module, two_stage.callback(), directory=tmp_path)
    trainer = train_and_die.quiet_trainer(callbacks=[two_stage.callback()])
    fresh = Predicts()
    batches = trainer.predict(fresh, ckpt_path=tmp_path / "epoch=5.ckpt")
    module.trainer = trainer
    expected = [module(x) for x, _ in module.loader(2)]
    assert_equal([batch.detach() for batch in batches], [each.detach() for each in expected])


class Predicts(SmallModule):
    def predict_dataloader(self):
        return self.loader(2)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


# -------------------------------------------------------------------------------------------------- what was understood


@pytest.mark.parametrize(
    ("starts", "line"),
    [
        ((0, 1), "signs are trained from the start, and frozen from epoch 1 of 6"),
        ((0.0, 1.0), "frozen never: after 100 % of 12 steps"),
        (
            (0.25, 9),
            "signs are trained after 25 % of 12 steps (a fraction; an epoch is an integer), and frozen never: fr",
        ),
    ],
)
def test_a_line_says_what_the_starts_mean(starts, line, caplog):
    with caplog.at_level("INFO"):
        fit(SmallModule(), two_stage.callback("native", *starts))
    assert line in caplog.text


@pytest.mark.parametrize("starts", [(True, 2), (0, True), ("1", 2), (None, 0.5), (0, float("nan"))])
def test_starts_of_another_kind_are_refused(starts):
    with pytest.raises(MisconfigurationException, match="must be an epoch"):
        two_stage.callback("native", *starts)
