"""One training of a comparison: from config, row, seed and learning rate to figures, kept so that it is done once."""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

import pibinn_plugin as pb
from lightning_modules.compare.callback import BaselineQAT
from lightning_modules.compare.dense_twin import RowError, densify
from lightning_modules.compare.parq import PARQ
from lightning_modules.compare.rows import Row
from lightning_modules.compare.storage import load_baseline, save_baseline, stored_size
from lightning_modules.modules import SolverModule
from lightning_modules.solver_cli import SolverCLI
from lightning_modules.trainer import SolverTrainer
from pibinn_plugin.errors import ArtifactError, ScaleError, StructureError
from pibinn_plugin.storage.atomic_file import atomic_file

__all__ = ["Run", "build", "callbacks_of", "evaluate", "finished_run", "inference_microseconds", "train"]

_TIMED_SECONDS, _TIMED_CALLS = 1.0, 200

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is trained: all that its result depends on, besides the code, the data files and the machine.

    Args:
        options: of the command line, as for ``fit``.
        configs: the text of each config that the options name.
        row: quantizer and overrides.
        seed: of everything that is drawn: weights, and training data where they take a seed.
        learning_rate: of weights and latents.
        start: what a baseline starts from, where one-bit weights start from data.
        seeded: more options of the command line that get the seed.
    """

    options: tuple[str, ...]
    configs: tuple[str, ...]
    row: Row
    seed: int
    learning_rate: float
    start: str | None = None
    seeded: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its files: readable, and another one whenever anything it depends on is another."""
        row = "".join(letter if letter.isalnum() else "_" for letter in self.row.name)
        start = f"-{self.start}" if self.start else ""
        # The title of a row does not change a run.
        fields = asdict(self) | {"row": [self.row.quantizer, self.row.overrides]}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]
        return f"{row}{start}-lr{self.learning_rate:g}-seed{self.seed}-{digest}"


def finished_run(run: Run, folder: Path) -> Result | None:
    """The result of a run that was finished before, or None."""
    path = folder / f"{run.name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def build(run: Run, root: str) -> SolverCLI:
    """Module, data and trainer of a run, as the command line makes them, with the row's quantizer in place of qat.

    Raises:
        MisconfigurationException: the config has no TwoStageQAT, or what the classes that it names refuse.
    """
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    arguments = [
        *run.options,
        *run.row.options,
        *(f"--{option}={run.seed}" for option in run.seeded),
        f"--seed_everything={run.seed}",
        f"--model.learning_rate={run.learning_rate!r}",
        f"--trainer.default_root_dir={root}",
        *(f"--trainer.{key}=false" for key in quiet),
        "--trainer.limit_val_batches=0",  # every row trains to the end, and is evaluated as it is stored
    ]
    cli = _SeededCLI(SolverModule, trainer_class=SolverTrainer, run=False, save_config_callback=None, args=arguments)
    _place_quantizer(cli, run)
    return cli


def callbacks_of(cli: SolverCLI) -> list[pl.Callback]:
    """The callbacks of the trainer, to read and to change."""
    return cast(SolverTrainer, cli.trainer).callbacks


class _SeededCLI(SolverCLI):
    """Seeds of a comparison are also those of the training data, where these take one."""

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if self.config.get("data") is None:
            raise MisconfigurationException("the config names no data module: what should the rows train on?")
        if "seed" in (arguments := self.config.data.get("init_args", {})):
            arguments.seed = self.config.seed_everything


def _place_quantizer(cli: SolverCLI, run: Run) -> None:
    callbacks = callbacks_of(cli)
    places = [index for index, callback in enumerate(callbacks) if isinstance(callback, pb.TwoStageQAT)]
    if not places:
        raise MisconfigurationException("without qat (--float_twin true) there are no targets to compare quantizers on")
    qat: Any = callbacks[places[0]]
    row, start, solution = run.row.quantizer, qat.schedule.sign_stage_start, run.start or "signs"
    if row != "global":
        callbacks[places[0]] = BaselineQAT(qat.targets, row, start, qat.initialization, solution)
    if row == "parq":
        callbacks.append(PARQ(start / (cli.trainer.max_epochs or 1) if isinstance(start, int) else start))


def train(run: Run, folder: Path) -> Result:
    """Train, write the packed file, read it back, and measure the network that was read.

    Args:
        run: what to train.
        folder: gets ``<name>.safetensors`` and, when all is done, ``<name>.json``.

    Returns:
        The result, as in the JSON file: metrics by set, sizes, times; or ``diverged``, where weights are not finite.

    Raises:
        RowError: the row does not apply to this solver.
    """
    result: Result = {"run": asdict(run)}
    path = folder / f"{run.name}.safetensors"
    with tempfile.TemporaryDirectory() as root:
        cli = build(run, root)
        solver = copy.deepcopy(cli.model.solver)  # as its constructor made it
        if run.row.quantizer == "fp32_dense":
            _check_dense_twin(cli)
        start = time.perf_counter()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        result["train_seconds"] = time.perf_counter() - start
    try:
        result |= _store(cli.model.cpu(), run.row.quantizer, path)
    except (ArtifactError, ScaleError, StructureError) as error:
        result["diverged"] = str(error)
    else:
        load = pb.load if run.row.quantizer == "global" else load_baseline
        result |= _measure(load(path, solver), cli.datamodule, cli.model)
    _write(folder / f"{run.name}.json", result)
    return result


@torch.no_grad()
def _check_dense_twin(cli: SolverCLI) -> None:
    """Raise `RowError` unless the solver gives the same estimates with the dense twins of its layers."""
    cli.datamodule.setup("test")
    y = next(iter(cli.datamodule.test_dataloader()))[0][:1]
    targets = next(callback.targets for callback in callbacks_of(cli) if isinstance(callback, BaselineQAT))
    twin = copy.deepcopy(cli.model).eval()
    expected = twin(y)
    densify(twin, targets)
    try:
        is_twin = torch.allclose(twin(y), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    except (RuntimeError, ValueError, IndexError):  # a compact weight was expected
        is_twin = False
    if not is_twin:
        raise RowError(
            f"{type(twin.solver).__name__} uses its weights in the structure that it was built with; for its dense "
            f"twin, give a row of quantizer fp32 the overrides that build it dense"
        )


def _store(module: SolverModule, quantizer: str, path: Path) -> Result:
    if quantizer == "global":
        pb.save(pb.convert(module.solver), path)
    else:
        save_baseline(module.solver, quantizer, path)
    result: Result = {"file": path.name, **asdict(stored_size(path))}
    if quantizer.startswith("ternary"):
        two_bit = save_baseline(module.solver, quantizer, path.with_suffix(".two_bit.safetensors"), trit_base=4)
        result["two_bit"] = asdict(stored_size(two_bit))
    return result


def _measure(solver: nn.Module, data: pl.LightningDataModule, module: SolverModule) -> Result:
    data.setup("fit")
    data.setup("test")
    test = data.test_dataloader()
    result: Result = {
        "train": evaluate(solver, data.train_dataloader(), module.val_metrics),
        "val": evaluate(solver, data.val_dataloader(), module.val_metrics),
        "test": evaluate(solver, test, module.test_metrics),
    }
    y = next(iter(test))[0][:1]
    return result | {"inference_microseconds": inference_microseconds(solver, y)}


@torch.no_grad()
def evaluate(
    solver: nn.Module, batches: Iterable[Sequence[Tensor]], metrics: MetricCollection
) -> dict[str, float | None]:
    """Metrics of a solver over batches (y, x), by name; None for one that is not finite."""
    metrics, solver = metrics.clone(), solver.eval()
    metrics.reset()
    for y, x in batches:
        metrics.update(solver(y), x)
    values = {name.rpartition("/")[2]: float(value) for name, value in metrics.compute().items()}
    return {name: value if abs(value) < float("inf") else None for name, value in values.items()}


@torch.inference_mode()
def inference_microseconds(solver: nn.Module, y: Tensor) -> float:
    """The median time of one call with a batch of one, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(10):
            solver(y)
        times: list[float] = []
        while len(times) < _TIMED_CALLS and sum(times) < _TIMED_SECONDS:
            start = time.perf_counter()
            solver(y)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1e6 * statistics.median(times)


def _write(path: Path, result: Result) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
