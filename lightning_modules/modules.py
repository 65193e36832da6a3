"""SolverModule: the LightningModule around any solver that maps measurements to unknowns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.schemes import schemes_in
from pibinn_plugin.weights import one_bit_weights

__all__ = ["SolverModule"]

Batch = tuple[Tensor, Tensor]


class SolverModule(pl.LightningModule):
    """Train a solver on batches ``(y, x)`` with Adam and a cosine schedule to zero.

    Three groups of parameters have learning rates of their own: weights (latents, once `TwoStageQAT` has prepared the
    module, and the scales in a baseline's weights), the scalars of the algorithm (step sizes, thresholds), and λ.

    Args:
        solver: a module that maps y, shape (batch, measurements), to an estimate of x, shape (batch, unknowns).
        metrics: computed over the validation and the test set, logged as ``val/<name>`` and ``test/<name>``.
        test_metrics: over the test set, in the place of these: where it is told what the others are not. The same
            unless given.
        learning_rate: of weights and latents.
        scalar_learning_rate: of everything else but λ.
        scale_learning_rate: of λ, as a fraction of its value when training starts.
        loss: of the estimate and x.

    Raises:
        MisconfigurationException: in training and evaluation, a batch that is no pair of finite tensors, or an estimate
            of another shape than x.

    Example:
        >>> from lightning_modules.metrics import NMSE
        >>> from lightning_modules.operators import SignBlocks
        >>> from lightning_modules.solvers.coupled_ista import CoupledISTA
        >>> module = SolverModule(CoupledISTA(SignBlocks(2, 4, 8), layers=3), metrics=[NMSE()])
        >>> module(torch.zeros(1, 8)).shape
        torch.Size([1, 16])
    """

    def __init__(
        self,
        solver: nn.Module,
        metrics: Sequence[Metric] = (),
        learning_rate: float = 5e-3,
        scalar_learning_rate: float = 5e-3,
        scale_learning_rate: float = 5e-3,
        loss: nn.Module | None = None,
        test_metrics: Sequence[Metric] | None = None,
    ) -> None:
        super().__init__()
        self.solver = solver
        self.learning_rate, self.scalar_learning_rate = learning_rate, scalar_learning_rate
        self.scale_learning_rate = scale_learning_rate
        self.loss = nn.MSELoss() if loss is None else loss
        of_test_set = metrics if test_metrics is None else test_metrics
        self.val_metrics = MetricCollection(list(metrics)).clone(prefix="val/")
        self.test_metrics = MetricCollection(list(of_test_set)).clone(prefix="test/")

    @override
    def forward(self, y: Tensor) -> Tensor:
        """The estimate of x, shape (batch, unknowns), from y, shape (batch, measurements)."""
        return self.solver(y)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict, as `torch.nn.Module` does.

        Raises:
            MisconfigurationException: it is that of another network; or it holds one-bit weights and this module is not
                prepared for them. The module may have taken a part of it then, as with torch.
        """
        if (schemes := schemes_in(state_dict)) and not one_bit_weights(self):
            raise MisconfigurationException(
                f"the checkpoint holds one-bit weights (scheme {', '.join(sorted(schemes))}), and this module float "
                f"ones: prepare it first, pibinn_plugin.prepare(module, targets, scheme), with the targets of the "
                f"training, then load_state_dict; or give the Trainer the TwoStageQAT callback and the ckpt_path"
            )
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise MisconfigurationException(
                f"the checkpoint is that of another network than this one: {reason[:400]}"
            ) from error

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        y, x = _checked(batch)
        loss = self.loss(self._estimate(y, x), x)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.val_metrics, batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.test_metrics, batch)

    def _estimate(self, y: Tensor, x: Tensor) -> Tensor:
        estimate = self(y)
        if estimate.shape != x.shape:  # a loss would broadcast them
            raise MisconfigurationException(
                f"the solver maps y of shape {tuple(y.shape)} to {tuple(estimate.shape)}, but x has shape "
                f"{tuple(x.shape)}: the data and the solver must agree"
            )
        return estimate

    def _evaluate(self, metrics: MetricCollection, batch: Batch) -> None:
        y, x = _checked(batch)
        metrics.update(self._estimate(y, x), x)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = [{"params": list(parameters), "lr": rate} for parameters, rate in self._parameter_groups()]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameter_groups(self) -> Iterator[tuple[list[nn.Parameter], float]]:
        weights, scales_of_weights, scalars, scales = [], [], [], []
        scale_ids = {id(module.value) for module in self.modules() if isinstance(module, GlobalScale)}
        for name, parameter in self.named_parameters():
            if id(parameter) in scale_ids:
                scales.append(parameter)
            # "original" is what a torch parametrization calls the parameter behind a weight.
            elif name.rpartition(".")[2] in ("weight", "original"):
                weights.append(parameter)
            elif name.rpartition(".")[2] == "scales":
                scales_of_weights.append(parameter)
            else:
                scalars.append(parameter)
        yield weights, self.learning_rate
        yield scales_of_weights, self.learning_rate  # apart: PARQ draws all of the group of the latents to two values
        yield scalars, self.scalar_learning_rate
        yield scales, self.scale_learning_rate * max((float(scale.detach().abs()) for scale in scales), default=1.0)


def _checked(batch: Batch) -> Batch:
    """A pair (y, x) of finite tensors: one NaN would spread over all weights, and no error would say so."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not is_pair:
        raise MisconfigurationException(f"a batch is a {type(batch).__name__}; expected a pair (y, x) of tensors")
    for name, values in zip("yx", batch, strict=True):
        if not values.isfinite().all():
            raise MisconfigurationException(f"{name} of a batch holds NaN or infinite values: correct the data")
    return batch
