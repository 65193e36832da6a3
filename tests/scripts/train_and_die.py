"""Trains once undisturbed, then again in processes that are killed and resumed, and leaves both runs to compare.

    python tests/scripts/train_and_die.py DIRECTORY --experiment MODULE:FUNCTION --deaths write random replace

FUNCTION takes no arguments and returns an :class:`Experiment`: a new LightningModule with its data, the callbacks under
test, and arguments of the Trainer. The module's ``training_step`` returns the loss; what is logged as ``val/loss`` is
recorded too. Each process is forked from this one, which has torch and Lightning imported and has computed nothing.

A death is a SIGKILL, to the whole process group where there are several ranks:

    random   after a random time
    write    in the middle of the bytes of the process's second checkpoint file
    replace  when the second checkpoint file is written, before it gets its name
    named    right after it got its name

After the last death a process runs to the end. ``DIRECTORY/undisturbed`` and ``DIRECTORY/killed`` then hold
``checkpoints/last.ckpt`` and, for each rank, ``losses-RANK.txt`` with a line "kind step value" for every loss, repeated
where a resumed process has trained a step again; standard output says how each process ended.
"""

import argparse
import functools
import importlib
import io
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.checkpointing import AtomicCheckpointIO, RandomState

FATAL_WRITE = 2


@dataclass
class Experiment:
    """What to train."""

    module: pl.LightningModule
    trainer_arguments: dict[str, Any]
    callbacks: list[pl.Callback] = field(default_factory=list)
    datamodule: pl.LightningDataModule | None = None
    checkpoint_arguments: dict[str, Any] = field(default_factory=dict)
    random_state: bool = True


class TinyModule(pl.LightningModule):
    """Draws from every generator, in every place where a user's module may."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers
        self.scale = nn.Parameter(torch.ones(1))
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.scale * self.layers(x), y)

    def on_train_start(self):
        # Each rank goes its own way from here; and a resumed process draws here, as the undisturbed one does not.
        torch.manual_seed(100 + self.global_rank)
        torch.rand(3)

    def on_train_epoch_start(self):
        self.noise = torch.rand(1).item()

    def on_train_epoch_end(self):
        torch.rand(1)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return loss * (1 + 0.1 * (self.noise + random.gauss(0, 0.1) + numpy.random.normal() + torch.rand(1)))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch) + torch.rand(1))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=64)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        # Made of the process's own random numbers, as data often are: the resumed process has to make the same.
        x = torch.randn(64, 6)
        return DataLoader(
            TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True, num_workers=self.workers
        )

    def val_dataloader(self):
        x = torch.linspace(-1, 1, 48).reshape(8, 6)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def tiny() -> Experiment:
    return Experiment(TinyModule(), {"max_epochs": 8})


def tiny_on_two_ranks() -> Experiment:
    return Experiment(TinyModule(), {"max_epochs": 8, "devices": 2, "strategy": "ddp_fork"})


class Recorder(pl.Callback):
    """Writes the losses as they come, in single appends that a kill cannot tear."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def record(self, trainer: pl.Trainer, kind: str, value: torch.Tensor) -> None:
        line = f"{kind} {trainer.global_step} {float(value).hex()}\n"
        with open(self.directory / f"losses-{trainer.global_rank}.txt", "ab", buffering=0) as file:
            file.write(line.encode())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.record(trainer, "train", outputs["loss"])

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.record(trainer, "validation", trainer.callback_metrics["val/loss"])


class DyingCheckpointIO(AtomicCheckpointIO):
    """Kills its process group at a moment of the FATAL_WRITE-th write."""

    def __init__(self, moment: str) -> None:
        self.moment = moment
        self.writes = 0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.writes += 1
        if self.writes < FATAL_WRITE:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        replace = os.replace

        def half_save(checkpoint: Any, file: Any, save: Callable = torch.save) -> None:
            buffer = io.BytesIO()
            save(checkpoint, buffer)
            file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            file.flush()
            die()

        def replace_and_die(source: Path, target: Path) -> None:
            replace(source, target)
            die()

        patches = {
            "write": mock.patch("torch.save", half_save),
            "replace": mock.patch("os.replace", lambda *_: die()),
            "named": mock.patch("os.replace", replace_and_die),
        }
        with patches[self.moment]:
            super().save_checkpoint(checkpoint, path, storage_options)


def die() -> None:
    os.killpg(0, signal.SIGKILL)


def quiet_trainer(**arguments: Any) -> pl.Trainer:
    arguments = {"accelerator": "cpu", **arguments}
    return pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, **arguments)


def train(
    experiment: Callable[[], Experiment],
    directory: Path,
    *,
    seed: int = 0,
    checkpoint_io: AtomicCheckpointIO | None = None,
    **trainer_arguments: Any,
) -> pl.Trainer:
    """Trains in this process, from the last checkpoint in ``directory`` if there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(seed, verbose=False)
    parts = experiment()
    trainer = quiet_trainer(
        plugins=[checkpoint_io or AtomicCheckpointIO()],
        callbacks=[
            *([RandomState()] if parts.random_state else []),
            *parts.callbacks,
            Recorder(directory),
            ModelCheckpoint(directory / "checkpoints", save_last=True, **parts.checkpoint_arguments),
        ],
        **parts.trainer_arguments | trainer_arguments,
    )
    trainer.fit(parts.module, datamodule=parts.datamodule, ckpt_path="last")
    return trainer


def train_in_fork(run: Callable[..., Any], death: str | None, delay: float) -> str:
    """Runs a forked process until it ends or dies; says how that was."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        # Threads do not survive a fork: an OpenMP pool inherited half would hang.
        torch.set_num_threads(1)
        status = 1
        try:
            run(checkpoint_io=DyingCheckpointIO(death) if death not in (None, "random") else None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if death == "random":
        os.setpgid(child, child)  # here too: the child may not have come to it yet
        time.sleep(delay)
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a training process ended with status {code}")
    return "finished" if code == 0 else f"killed ({death}{f' after {delay:.2f} s' if death == 'random' else ''})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experiment", default="train_and_die:tiny", help="MODULE:FUNCTION")
    parser.add_argument("--deaths", nargs="*", default=[], choices=["random", "write", "replace", "named"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    module, function = arguments.experiment.split(":")
    run = functools.partial(train, getattr(importlib.import_module(module), function), seed=arguments.seed)

    start = time.monotonic()
    print("undisturbed:", train_in_fork(functools.partial(run, arguments.directory / "undisturbed"), None, 0.0))
    duration = time.monotonic() - start

    # Not the global generator: the training processes are forked with its state.
    moments = random.Random()
    killed = arguments.directory / "killed"
    for death in [*arguments.deaths, None]:
        outcome = train_in_fork(functools.partial(run, killed), death, moments.uniform(0, duration))
        print("killed:", outcome, flush=True)
        if outcome == "finished":
            break


if __name__ == "__main__":
    main()
