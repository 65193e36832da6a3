"""PARQ from torchao, the closest peer of one-bit training, behind Lightning's automatic optimization."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from lightning_modules.compare.baselines import baseline_weights
from lightning_modules.compare.dense_twin import RowError
from pibinn_plugin.schemes.quiet_import import quiet_import

__all__ = ["PARQ"]

ANNEAL_END = 0.75  # of training; then the weights keep their two values and, like stage 2, the scalars settle


class PARQ(Callback):
    """Piecewise-affine regularized quantization of the weights that `BaselineQAT` with ``parq`` has prepared.

    Jin et al., "PARQ: Piecewise-Affine Regularized Quantization", arXiv 2503.15748, as in ``torchao.prototype.parq``
    with its defaults: the module's optimizer trains the latents, a proximal map draws the weights from them towards
    ``±mean|V|`` of their layer and holds them there from three quarters of training on. It stores what `LayerWiseSign`
    stores. A stopped run starts anew: torchao keeps the progress of the annealing in no state dict.

    Args:
        start: when annealing begins: a fraction of all optimizer steps.

    Raises:
        RowError: torchao is not installed, or the optimizer has no group of parameters of the prepared weights alone.
    """

    def __init__(self, start: float = 0.0) -> None:
        self.start = start
        _torchao_parq()  # here and not in the timed training: it takes seconds

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        latents = {id(latent) for _, latent, _ in baseline_weights(pl_module)}
        [optimizer] = trainer.optimizers
        groups = [group for group in optimizer.param_groups if {id(p) for p in group["params"]} <= latents]
        if sum(len(group["params"]) for group in groups) != len(latents):
            raise RowError("PARQ needs the quantized weights in parameter groups of their own, without other weights")
        for group in groups:
            group["quant_bits"] = 1
        steps = int(trainer.estimated_stepping_batches)
        trainer.optimizers = [_parq_optimizer(optimizer, int(self.start * steps), int(ANNEAL_END * steps))]


def _torchao_parq() -> ModuleType:
    try:
        with quiet_import():
            return importlib.import_module("torchao.prototype.parq")
    except ImportError as error:
        raise RowError(f"PARQ comes with torchao: pip install pibinn-plugin[torchao] ({error})") from error


def _parq_optimizer(optimizer: torch.optim.Optimizer, anneal_start: int, anneal_end: int) -> torch.optim.Optimizer:
    parq: Any = _torchao_parq()
    if anneal_start >= anneal_end:
        raise RowError(f"PARQ anneals over the steps {anneal_start} to {anneal_end}: the training is too short for it")

    class ClosureFirst(parq.QuantOptimizer):
        """Runs the closure on the quantized weights; torchao would run it on the latents, and so train in float."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with torch.enable_grad():
                loss = None if closure is None else closure()
            super().step()
            return loss

    return ClosureFirst(optimizer, parq.LSBQuantizer(), parq.ProxPARQ(anneal_start, anneal_end))
