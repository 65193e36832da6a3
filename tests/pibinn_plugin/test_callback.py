"""TwoStageQAT in real trainings: what each stage moves, when stages switch, what is logged, what is refused."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import train_and_die
import two_stage
from fit_two_stage import C, S, W, fit, moved
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset
from two_stage import EPOCHS, TARGETS, SmallModule

import pibinn_plugin as pb
from pibinn_plugin.schemes import SCHEMES
from pibinn_plugin.workflow import quantized_weights

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
