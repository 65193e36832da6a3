"""Couplings found by two-stage training from samples: recovered, resumed bit for bit, packed; starts of baselines."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

import pibinn_plugin as pb
from lightning_modules.compare.callback import BaselineQAT
from lightning_modules.coupling_start import COUPLINGS, CouplingsFromSamples
from lightning_modules.data.spin_samples import SpinSamples
from lightning_modules.inverse_ising import one_bit_couplings
from lightning_modules.metrics import NMSE, SignAccuracy
from lightning_modules.modules import SolverModule
from lightning_modules.pseudo_likelihood import PseudoLikelihood, PseudoLikelihoodLoss
from lightning_modules.solvers.local_fields import LocalFields
from pibinn_plugin.initialization import StartsFloatWeights

TARGETS = {"solver.weight": None}


def data(size=6, samples=60):
    return SpinSamples(size, 0.5, samples, 30, batch_size=samples // 2, sweeps=50, seed=1)


def module(size=6):
    torch.manual_seed(0)
    return SolverModule(
        LocalFields(size),
        [PseudoLikelihood()],
        learning_rate=1e-3,
        scale_learning_rate=0.02,
        loss=PseudoLikelihoodLoss(),
        test_metrics=[NMSE(), SignAccuracy()],
    )


def qat(scale_stage_start=0.5):
    return pb.TwoStageQAT(TARGETS, scale_stage_start=scale_stage_start, initialization=CouplingsFromSamples())


def fit(callbacks, epochs=6, ckpt_path=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **{"enable_checkpointing": False} | quiet | options)
    trained = module()
    trainer.fit(trained, datamodule=data(), ckpt_path=ckpt_path)
    return trained, trainer


def test_two_stages_recover_the_couplings_and_pack_them(tmp_path):
    trained, trainer = fit([qat()])
    [tested] = trainer.test(trained, datamodule=data(), verbose=False)
    assert tested["test/SignAccuracy"] == 1.0
    assert tested["test/NMSE"] < -20
    assert set(tested) == {"test/NMSE", "test/SignAccuracy"}
    packed = pb.load(pb.save(pb.convert(trained.solver), tmp_path / "glass.safetensors"))
    spins = torch.randint(2, (9, 6, 6)) * 2.0 - 1.0
    assert torch.equal(packed(spins), trained.solver(spins))


def test_the_scale_alone_ends_where_the_samples_want_it():
    trained, _ = fit([qat(scale_stage_start=0)], epochs=100)
    given = data()
    given.setup("fit")
    start = one_bit_couplings(given.train_set.samples)
    assert pb.global_scale(trained)().item() == pytest.approx(start.scale, rel=0.02)


def test_a_resumed_run_equals_the_undisturbed_one(tmp_path):
    class Dies(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                raise RuntimeError("dies")

    whole, _ = fit([qat()])
    checkpoint = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    with pytest.raises(RuntimeError, match="dies"):
        fit([qat(), checkpoint, Dies()], enable_checkpointing=True)
    resumed, _ = fit([qat()], ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed.solver.weight, whole.solver.weight)
    assert torch.equal(pb.global_scale(resumed)(), pb.global_scale(whole)())


@pytest.mark.parametrize("solution", COUPLINGS)
def test_a_baseline_starts_at_a_solution(solution):
    given = data()
    given.setup("fit")
    solver = LocalFields(6)
    CouplingsFromSamples().start_float_weights(solver, {"weight": None}, given.train_dataloader(), solution)
    samples = torch.cat([spins for spins, _ in given.train_dataloader()])
    assert torch.equal(solver.weight, COUPLINGS[solution](samples))
    start = CouplingsFromSamples(solutions=[solution])
    trained, _ = fit([BaselineQAT(TARGETS, "fp32", initialization=start, solution=solution)], epochs=1)
    assert (trained.solver.weight - solver.weight).abs().max() < 0.005  # a few steps of 0.001


def test_it_is_an_initialization_that_starts_float_weights_too():
    assert isinstance(CouplingsFromSamples(), StartsFloatWeights)


@pytest.mark.parametrize("solutions", [[], ["box", "lasso"]])
def test_unknown_solutions_are_refused(solutions):
    with pytest.raises(pb.PIBiNNError, match="expected some of ridge, box, signs, ternary"):
        CouplingsFromSamples(solutions=solutions)


def test_what_is_not_there_is_named():
    prepared = pb.prepare(LocalFields(6), {"weight": None})
    batches = [(torch.ones(8, 6, 6), torch.ones(8, 6, 6))]
    with pytest.raises(pb.TargetError, match="'other' names 0 weights"):
        CouplingsFromSamples(weights="other")(prepared, batches)
    with pytest.raises(pb.PIBiNNError, match="lie on 2 processes"):
        CouplingsFromSamples()(prepared, batches, lambda ones: 2 * ones)
    with pytest.raises(pb.PIBiNNError, match=r"\(8, 4, 4\) and a weight of shape \(2, 6, 6\)"):
        CouplingsFromSamples()(prepared, [(torch.ones(8, 4, 4),) * 2])
    two = nn.ModuleList([LocalFields(4), LocalFields(4)])
    with pytest.raises(pb.TargetError, match="the one weight of LocalFields"):
        CouplingsFromSamples().start_float_weights(two, {"*.weight": None}, batches, "box")
