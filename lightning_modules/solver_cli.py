"""`SolverCLI`: LightningCLI for a `SolverModule`, in two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse.typing import PositiveInt
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_modules.checkpointing import AtomicCheckpointIO, RandomState, read_checkpoint
from lightning_modules.trainer import SolverTrainer
from lightning_modules.yaml_files import load_yaml
from pibinn_plugin import TwoStageQAT

__all__ = ["SolverCLI"]


class SolverCLI(LightningCLI):
    """LightningCLI for a `SolverModule`, with `TwoStageQAT` under the key ``qat``.

    A run lies under ``trainer.default_root_dir``, that of a float twin beside it, with ``_float_twin`` after its name.
    Every run keeps its random state and writes its checkpoint at the end of each epoch, atomically.
    """

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(TwoStageQAT, "qat")
        parser.add_argument(
            "--float_twin", type=bool, default=False, help="Train the same network with float weights: leave out qat."
        )
        parser.add_argument(
            "--threads", type=PositiveInt | None, help="CPU threads of torch; small networks run fastest on one."
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        parser.allow_abbrev = False  # --trainer.max_epoch is a mistake, not a short form
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        config = self.config if not self.config.get("subcommand") else self.config[self.config.subcommand]
        for file in config.get("config") or []:
            load_yaml(Path(str(file)))  # which refuses a key that is given twice
        path = config.get("ckpt_path")
        if path and Path(path).is_file():
            read_checkpoint(path)  # before LightningCLI reads it

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        own = {verb: {"model", "datamodule"} for verb in ("convert", "export", "summary", "analyze")}
        # Not predict: `apply` takes a packed file and data that no datamodule describes.
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"} | own

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        config.trainer.default_root_dir = str(config.trainer.default_root_dir or "runs")
        if config.float_twin:
            config.trainer.default_root_dir += "_float_twin"
        if config.threads is not None:
            torch.set_num_threads(config.threads)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # what the classes that the configuration names refuse
            raise MisconfigurationException(str(error)) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        root = Path(config.default_root_dir)
        if config.logger is None:
            kwargs["logger"] = CSVLogger(root)
        if config.plugins is None:
            kwargs["plugins"] = [AtomicCheckpointIO()]
        configured = config.callbacks or []
        has_own = any(isinstance(callback, ModelCheckpoint) for callback in configured)
        if config.enable_checkpointing is not False and not has_own:
            kwargs["callbacks"] = [*configured, _checkpoint_of_each_epoch(root)]
        trainer = cast(SolverTrainer, super().instantiate_trainer(**kwargs))
        if self._get(self.config_init, "float_twin"):
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, TwoStageQAT)]
        trainer.callbacks.insert(0, RandomState())  # first: what other callbacks draw comes from the restored state
        return trainer

    def after_fit(self) -> None:
        """Say where the run lies."""
        last = cast(SolverTrainer, self.trainer).last_checkpoint
        is_trial: bool = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.trainer.is_global_zero and last.is_file() and not is_trial:
            print(f"checkpoint: {last}")


def _checkpoint_of_each_epoch(root: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=root / "checkpoints", filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )
