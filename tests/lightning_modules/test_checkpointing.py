"""Killed and resumed runs equal undisturbed ones, bit for bit."""

import functools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import pytorch_lightning as pl
import torch
import train_and_die
from train_and_die import Experiment, TinyModule, train

from lightning_modules.checkpointing import AtomicCheckpointIO, RandomState

REPOSITORY = Path(__file__).parents[2]


def losses(run: Path, rank: int = 0) -> dict[tuple[str, str], set[str]]:
    """The values recorded for each loss: more than one where a resumed process has come to another."""
    values: dict[tuple[str, str], set[str]] = {}
    for line in (run / f"losses-{rank}.txt").read_text().splitlines():
        kind, step, value = line.split()
        values.setdefault((kind, step), set()).add(value)
    return values


def last_checkpoint(run: Path) -> dict[str, Any]:
    """What has to be equal of the last checkpoint; ModelCheckpoint keeps the paths of its run's files."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    callbacks = {key: state for key, state in checkpoint["callbacks"].items() if "ModelCheckpoint" not in key}
    names = ["state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"]
    return {name: checkpoint[name] for name in names} | {"callbacks": callbacks}


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def assert_same_run(first: Path, second: Path, ranks: int = 1) -> None:
    for rank in range(ranks):
        assert losses(first, rank) == losses(second, rank)
        assert all(len(values) == 1 for values in losses(first, rank).values())
    first_checkpoint, second_checkpoint = last_checkpoint(first), last_checkpoint(second)
    for name in first_checkpoint:
        assert equal(first_checkpoint[name], second_checkpoint[name]), name


@pytest.mark.parametrize(
    ("experiment", "ranks", "deaths"),
    [
        ("tiny", 1, ["named", "write", "random", "replace", "random", "named", "random"]),
        ("tiny_on_two_ranks", 2, ["write", "random", "named", "replace"]),
    ],
)
def test_a_killed_run_equals_an_undisturbed_one(tmp_path, experiment, ranks, deaths):
    command = [sys.executable, train_and_die.__file__, tmp_path, "--experiment", f"train_and_die:{experiment}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*command, "--deaths", *deaths], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("killed (write)") == 1
    assert result.stdout.rstrip().endswith("killed: finished")
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed", ranks)
    # The checkpoint torn by the kill was written again under its name.
    assert not list(tmp_path.rglob("*.partial"))


def two_halves(directory: Path, experiment: Callable[[], Experiment], limit: str, half: int) -> tuple[Path, Path]:
    train(experiment, directory / "whole", **{limit: 2 * half})
    train(experiment, directory / "halves", **{limit: half})
    train(experiment, directory / "halves", **{limit: 2 * half})
    return directory / "whole", directory / "halves"


@pytest.mark.parametrize(
    ("limit", "half", "checkpoint_arguments", "workers"),
    [
        ("max_epochs", 2, {}, 0),
        ("max_epochs", 2, {"save_on_train_epoch_end": False}, 0),
        ("max_epochs", 2, {}, 2),
        ("max_epochs", 2, {"monitor": "val/loss", "save_top_k": 2}, 0),
        ("max_steps", 16, {}, 0),
        ("max_steps", 16, {"save_on_train_epoch_end": False}, 0),
    ],
)
def test_resuming_repeats_whenever_the_checkpoint_is_written(tmp_path, limit, half, checkpoint_arguments, workers):
    def experiment() -> Experiment:
        return Experiment(TinyModule(workers), {}, checkpoint_arguments=checkpoint_arguments)

    assert_same_run(*two_halves(tmp_path, experiment, limit, half))


class LoaderWithPosition:
    """Goes on inside an epoch; Lightning keeps the state of loaders that have one."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for index in range(self.position, len(self.batches)):
            # Counted before the batch is given, and at zero with the last one: Lightning does not ask for another.
            self.position = (index + 1) % len(self.batches)
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict["position"]


class ModuleWithPosition(TinyModule):
    noise = 0.0

    def on_train_epoch_start(self):
        torch.rand(1)

    def train_dataloader(self):
        return LoaderWithPosition(list(super().train_dataloader()))


class ModuleThatAsksForItsSteps(ModuleWithPosition):
    """As every module does whose schedule is as long as the training."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class StopAtStep(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 21:
            raise InterruptedError


@pytest.mark.parametrize("module", [ModuleWithPosition, ModuleThatAsksForItsSteps])
def test_resuming_inside_an_epoch_repeats_with_a_loader_that_can(tmp_path, module):
    def experiment(callbacks: list[pl.Callback]) -> Experiment:
        return Experiment(module(), {"max_epochs": 4}, callbacks, checkpoint_arguments={"every_n_train_steps": 6})

    train(lambda: experiment([]), tmp_path / "undisturbed")
    with pytest.raises(InterruptedError):
        train(lambda: experiment([StopAtStep()]), tmp_path / "stopped")
    train(lambda: experiment([]), tmp_path / "stopped")
    assert_same_run(tmp_path / "undisturbed", tmp_path / "stopped")


def test_without_the_callback_resuming_does_not_repeat(tmp_path):
    whole, halves = two_halves(tmp_path, lambda: Experiment(TinyModule(), {}, random_state=False), "max_epochs", 2)
    assert losses(whole) != losses(halves)


def test_a_checkpoint_without_random_state_is_named(tmp_path):
    train(lambda: Experiment(TinyModule(), {"max_epochs": 1}, random_state=False), tmp_path)
    with pytest.warns(UserWarning, match=r"last\.ckpt holds no random state"):
        train(lambda: Experiment(TinyModule(), {"max_epochs": 2}), tmp_path)


def test_another_number_of_ranks_is_named(tmp_path):
    train(lambda: Experiment(TinyModule(), {"max_epochs": 1}), tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["RandomState"]["ranks"] *= 2
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    with pytest.warns(UserWarning, match="written by 2 ranks and is resumed by 1"):
        train(lambda: Experiment(TinyModule(), {"max_epochs": 2}), tmp_path)


def draws() -> tuple[float, ...]:
    return (random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.normal(), torch.rand(1).item())


def test_every_generator_goes_on_where_it_was():
    random.gauss(0, 1)  # half of a pair: Python and NumPy keep the other half
    numpy.random.normal()
    callback, trainer, module = RandomState(), train_and_die.quiet_trainer(), TinyModule()
    state = callback.state_dict()
    expected = draws()
    draws()
    callback.load_state_dict(state)
    callback.on_train_epoch_start(trainer, module)
    assert draws() == expected
    callback.on_train_epoch_start(trainer, module)
    assert draws() != expected


def test_the_state_of_a_tested_checkpoint_does_not_leak_into_a_later_fit():
    callback, trainer, module = RandomState(), train_and_die.quiet_trainer(), TinyModule()
    callback.load_state_dict(callback.state_dict())
    draws()
    expected = torch.get_rng_state()
    callback.setup(trainer, module, "fit")
    callback.on_train_epoch_start(trainer, module)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    path = tmp_path / "new directory" / "last.ckpt"
    checkpoint_io = AtomicCheckpointIO()
    checkpoint_io.save_checkpoint({"epoch": 1}, path)
    monkeypatch.setattr(failing, functools.partial(fail, OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        checkpoint_io.save_checkpoint({"epoch": 2}, path)
    monkeypatch.undo()
    assert checkpoint_io.load_checkpoint(path) == {"epoch": 1}
    assert os.listdir(path.parent) == ["last.ckpt"]


def fail(error: Exception, *_: Any) -> None:
    raise error


def test_a_partial_file_left_by_a_kill_is_written_over(tmp_path):
    (tmp_path / ".last.ckpt.partial").write_bytes(b"torn" * 10_000)
    checkpoint_io = AtomicCheckpointIO()
    checkpoint_io.save_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")
    assert checkpoint_io.load_checkpoint(tmp_path / "last.ckpt") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_paths_as_lightning_gives_them(tmp_path):
    checkpoint_io = AtomicCheckpointIO()
    for path in [str(tmp_path / "plain.ckpt"), f"file://{tmp_path}/address.ckpt", "memory://run/last.ckpt"]:
        checkpoint_io.save_checkpoint({"epoch": 1}, path)
        assert checkpoint_io.load_checkpoint(path) == {"epoch": 1}
    with pytest.raises(TypeError, match="storage_options"):
        checkpoint_io.save_checkpoint({}, tmp_path / "last.ckpt", storage_options={})
