"""SolverTrainer: a Trainer that knows where a run keeps its last checkpoint and its packed file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

import pibinn_plugin as pb
from lightning_modules.checkpointing import read_checkpoint
from lightning_modules.modules import SolverModule
from pibinn_plugin.export import FORMATS
from pibinn_plugin.export.c_compiler import memory_report
from pibinn_plugin.export.sizes import export_sizes

if TYPE_CHECKING:
    from lightning_modules.analysis.plan import Plan
    from lightning_modules.analyze import Analysis

__all__ = ["SolverTrainer"]


class SolverTrainer(pl.Trainer):
    """A Lightning Trainer with ``convert``, ``export``, ``summary`` and ``analyze``, of the run's last checkpoint.

    A run keeps everything under ``default_root_dir``: ``checkpoints/last.ckpt`` and ``solver.safetensors``. Where a
    checkpoint path is asked for, ``last`` means that of the run, and an absent file is an error.

    Raises:
        MisconfigurationException: no such checkpoint, or a run without `TwoStageQAT` (a float twin) to convert.
    """

    callbacks: list[pl.Callback]

    @property
    def last_checkpoint(self) -> Path:
        """Where the run keeps its checkpoint."""
        return Path(self.default_root_dir) / "checkpoints" / "last.ckpt"

    @property
    def float_twin_checkpoint(self) -> Path:
        """Where the run of the float twin keeps its checkpoint."""
        return Path(f"{self.default_root_dir}_float_twin") / "checkpoints" / "last.ckpt"

    @property
    def packed_file(self) -> Path:
        """Where ``convert`` writes the packed solver, unless told otherwise."""
        return Path(self.default_root_dir) / "solver.safetensors"

    @override
    def fit(
        self,
        model: pl.LightningModule,
        train_dataloaders: Any | None = None,
        val_dataloaders: Any | None = None,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train; with ``ckpt_path="last"``, go on with the run that lies here. A run that lies here is never replaced.

        Raises:
            MisconfigurationException: another run lies here, or the checkpoint is none.
        """
        last = self.last_checkpoint
        is_trial: bool = self.fast_dev_run  # type: ignore[attr-defined]
        if last.is_file() and not is_trial and any(_writes_to(each, last) for each in self.checkpoint_callbacks):
            if ckpt_path is None or (
                Path(ckpt_path).is_file() and Path(ckpt_path).resolve().parent != last.resolve().parent
            ):
                raise MisconfigurationException(
                    f"a run lies in {self.default_root_dir}, and its checkpoint {last} would be replaced: "
                    f"--ckpt_path last goes on with it, another --trainer.default_root_dir leaves it where it is"
                )
            read_checkpoint(last)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    @override
    def validate(  # type: ignore[override]
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any | None = None,
        ckpt_path: str | Path | None = "last",
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
    ) -> list[Mapping[str, float]]:
        """Evaluate a checkpoint on the validation set: ``last``, a path, or None for the model as it is."""
        return super().validate(model, dataloaders, self._whole_checkpoint(ckpt_path), verbose, datamodule)

    @override
    def test(  # type: ignore[override]
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any | None = None,
        ckpt_path: str | Path | None = "last",
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
        packed: str | Path | None = None,
    ) -> list[Mapping[str, float]]:
        """Evaluate on the test set.

        Args:
            model: The module that was trained.
            dataloaders: In the place of a datamodule.
            ckpt_path: ``last``, the path of a checkpoint, or None for the model as it is.
            verbose: Whether the results are printed.
            datamodule: Its data.
            packed: A packed file of the solver, in the place of a checkpoint.
        """
        if packed is None:
            return super().test(model, dataloaders, self._whole_checkpoint(ckpt_path), verbose, datamodule)
        if not isinstance(model, SolverModule) or ckpt_path not in ("last", None):
            raise MisconfigurationException("packed= takes a SolverModule, and no checkpoint beside it")
        pb.load(packed, into=model.solver)
        # Nothing is left to quantize, and nothing to train.
        self.callbacks = [each for each in self.callbacks if not isinstance(each, pb.TwoStageQAT)]
        return super().test(model, dataloaders, None, verbose, datamodule)

    def convert(
        self,
        model: SolverModule,
        ckpt_path: str | Path = "last",
        output: str | Path | None = None,
        datamodule: pl.LightningDataModule | None = None,
    ) -> Path:
        """Pack the solver of a checkpoint into one file of one bit a weight.

        Args:
            model: The module that was trained.
            ckpt_path: ``last``, or the path of a checkpoint.
            output: The packed file; ``<default_root_dir>/solver.safetensors`` unless given.
            datamodule: Its data, whose ``inputs`` the file states, for ``apply``.
        """
        packed = self._packed_solver(model, ckpt_path)
        path = pb.save(packed, output or self.packed_file, getattr(datamodule, "inputs", None))
        print(pb.summary(packed))
        print(f"packed file: {path} ({path.stat().st_size:,} bytes)")
        return path

    def export(
        self,
        model: SolverModule,
        datamodule: pl.LightningDataModule,
        format: Literal["onnx", "qonnx", "qcdq", "pt2", "aoti", "executorch", "c"] = "onnx",
        ckpt_path: str | Path = "last",
        output: str | Path | None = None,
    ) -> Path:
        """Export the packed solver of a checkpoint to another runtime, checked on measurements of the test set.

        Args:
            model: The module that was trained.
            datamodule: Its data.
            format: Of the file.
            ckpt_path: ``last``, or the path of a checkpoint.
            output: The file; ``<default_root_dir>/solver.<format>`` unless given (``solver.aoti.pt2`` for aoti).
        """
        packed = self._packed_solver(model, ckpt_path)
        path = Path(output or self._exported_file(format))
        measurements = _measurements(datamodule)
        # A device takes one measurement at a time, and every array of a C file has its size.
        pb.export(packed, path, (measurements[:1] if format == "c" else measurements,), format)
        print(f"{format} file: {path} ({path.stat().st_size:,} bytes)")
        if format == "c":
            print(memory_report(path))
        return path

    def summary(self, model: SolverModule, datamodule: pl.LightningDataModule | None = None) -> pb.Summary:
        """Show where the bytes of the solver are, as it is packed, and what its exported files take.

        Args:
            model: The module, trained or not.
            datamodule: Its data; without, exported files are not compared with those of the float twin.
        """
        self._prepare(model)
        report = pb.summary(model.solver)
        print(report)
        if self.packed_file.is_file():
            size = self.packed_file.stat().st_size
            header = size - report.total_bytes
            print(f"packed file: {self.packed_file} ({size:,} bytes, of which {header:,} are its header)")
        # A C file is source code: its bytes are not those on the device, which ``export`` prints.
        formats = [format for format in FORMATS if format != "c" and self._exported_file(format).is_file()]
        if formats and datamodule is not None:
            print("\nformat        bytes    float twin    float twin / this    this / stored")
            for entry in export_sizes(model.solver, (_measurements(datamodule),), formats):
                path = self.packed_file if entry.format == "packed" else self._exported_file(entry.format)
                size = path.stat().st_size if path.is_file() else entry.bytes
                ratios = f"{entry.float_bytes / size:>20.1f} {size / report.total_bytes:>16.3f}"
                print(f"{entry.format:<10} {size:>8,} {entry.float_bytes:>13,} {ratios}")
        return report

    def analyze(
        self,
        model: SolverModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | Path = "last",
        plan: float | None = None,
    ) -> Analysis | Plan:
        """Print the guarantees of a checkpoint's solver and save their plots under ``<default_root_dir>/analysis``.

        The float twin is compared with it where its run lies beside this one (``<default_root_dir>_float_twin``).

        Args:
            model: The module that was trained.
            datamodule: Its data.
            ckpt_path: ``last``, or the path of a checkpoint.
            plan: Print only how many training examples bring the loss on new ones within this gap, such as 0.1; no
                checkpoint is needed.
        """
        from lightning_modules.analyze import Trained, analyze, newest_sign_history, plan_examples

        untrained, twin = copy.deepcopy(model), None
        self._prepare(untrained)
        if plan is not None:
            if not 0 < plan < 1:
                raise MisconfigurationException(f"plan={plan}: a gap of the loss lies between 0 and 1")
            print(planned := plan_examples(untrained, datamodule, plan))
            return planned
        root = Path(self.default_root_dir)
        if (twin_checkpoint := self.float_twin_checkpoint).is_file():
            twin = copy.deepcopy(model)
            _load_state(twin, twin_checkpoint)
        self._prepare(model)
        epochs = _load_state(model, self._checkpoint(ckpt_path))
        start = next(each.initialization for each in self.callbacks if isinstance(each, pb.TwoStageQAT))
        report = analyze(Trained(model, untrained, twin, datamodule, epochs, newest_sign_history(root), start))
        print(report)
        for path in report.save_plots(root / "analysis"):
            print(f"plot: {path}")
        if twin is None:
            print(f"no float twin: {twin_checkpoint} does not exist; fit --float_twin true trains one")
        return report

    def _exported_file(self, format: str) -> Path:
        # AOTInductor loads no other name than *.pt2.
        return Path(self.default_root_dir) / ("solver.aoti.pt2" if format == "aoti" else f"solver.{format}")

    def _packed_solver(self, model: SolverModule, ckpt_path: str | Path) -> nn.Module:
        self._prepare(model)
        _load_state(model, self._checkpoint(ckpt_path))
        return pb.convert(model.solver)

    def _prepare(self, model: SolverModule) -> None:
        callback = next((callback for callback in self.callbacks if isinstance(callback, pb.TwoStageQAT)), None)
        if callback is None:
            raise MisconfigurationException("this run has no TwoStageQAT: a float twin has no one-bit weights")
        pb.prepare(model, callback.targets, callback.scheme)

    def _checkpoint(self, path: str | Path | None) -> str | Path | None:
        if path == "last":
            path = self.last_checkpoint
        if path is not None and not Path(path).is_file():
            raise MisconfigurationException(f"there is no checkpoint {path}: run fit first, or give --ckpt_path")
        return path

    def _whole_checkpoint(self, path: str | Path | None) -> str | Path | None:
        """The path of a checkpoint that Lightning will read itself, and would not say what is wrong with."""
        if (found := self._checkpoint(path)) is not None:
            read_checkpoint(found)
        return found


def _writes_to(callback: pl.callbacks.Checkpoint, last: Path) -> bool:
    directory = getattr(callback, "dirpath", None)
    return directory is not None and Path(directory).resolve() == last.resolve().parent


def _load_state(model: SolverModule, path: str | Path | None) -> int:
    """Load a checkpoint; return how many epochs of training are behind it, the one it was written in among them."""
    checkpoint = read_checkpoint(str(path))
    model.load_state_dict(checkpoint["state_dict"])
    return int(checkpoint["epoch"]) + 1


def _measurements(datamodule: pl.LightningDataModule) -> Tensor:
    """A few measurements of the test set, shape (8, measurements)."""
    datamodule.setup("test")
    return next(iter(datamodule.test_dataloader()))[0][:8]
