"""SolverTrainer: a Trainer that knows where a run keeps its last checkpoint and its packed file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from typing_extensions import override

import pibinn_plugin as pb
from lightning_modules.modules import SolverModule

__all__ = ["SolverTrainer"]


class SolverTrainer(pl.Trainer):
    """A Lightning Trainer with the verbs ``convert`` and ``summary``; evaluation loads the run's last checkpoint.

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
    def packed_file(self) -> Path:
        """Where ``convert`` writes the packed solver, unless told otherwise."""
        return Path(self.default_root_dir) / "solver.safetensors"

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
        return super().validate(model, dataloaders, self._checkpoint(ckpt_path), verbose, datamodule)

    @override
    def test(  # type: ignore[override]
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any | None = None,
        ckpt_path: str | Path | None = "last",
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
    ) -> list[Mapping[str, float]]:
        """Evaluate a checkpoint on the test set: ``last``, a path, or None for the model as it is."""
        return super().test(model, dataloaders, self._checkpoint(ckpt_path), verbose, datamodule)

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
            datamodule: Not read: LightningCLI hands it to every verb.
        """
        self._prepare(model)
        checkpoint = torch.load(str(self._checkpoint(ckpt_path)), map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        packed = pb.convert(model.solver)
        path = pb.save(packed, output or self.packed_file)
        print(pb.summary(packed))
        print(f"packed file: {path} ({path.stat().st_size:,} bytes)")
        return path

    def summary(self, model: SolverModule, datamodule: pl.LightningDataModule | None = None) -> pb.Summary:
        """Show where the bytes of the solver are, as it is packed.

        Args:
            model: The module, trained or not.
            datamodule: Not read: LightningCLI hands it to every verb.
        """
        self._prepare(model)
        report = pb.summary(model.solver)
        print(report)
        if self.packed_file.is_file():
            size = self.packed_file.stat().st_size
            header = size - report.total_bytes
            print(f"packed file: {self.packed_file} ({size:,} bytes, of which {header:,} are its header)")
        return report

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
