"""Trainings of the small network with TwoStageQAT in a real Trainer, and what they leave for a test to look at."""

import pytorch_lightning as pl
import torch
import train_and_die
from pytorch_lightning.callbacks import ModelCheckpoint
from two_stage import EPOCHS

import pibinn_plugin as pb
from lightning_modules.checkpointing import AtomicCheckpointIO, RandomState
from pibinn_plugin.workflow import quantized_weights

W, S, C = "warm_up", "signs", "scale"


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
