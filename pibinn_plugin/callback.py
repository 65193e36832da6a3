"""`TwoStageQAT`: two-stage quantization-aware training inside ``Trainer.fit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.enums import StrEnum
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.quantizer import initial_scale
from pibinn_plugin.structure import Structure
from pibinn_plugin.workflow import QuantizedWeight, freeze_signs, global_scale, prepare, quantized_weights


class Stage(StrEnum):
    """What a training step updates."""

    WARM_UP = "warm_up"  # latents as float weights, without quantizers
    SIGNS = "signs"  # stage 1: latents behind the sign, λ and float parameters
    SCALE = "scale"  # stage 2: λ and float parameters; the signs are frozen


_ORDER = [Stage.WARM_UP, Stage.SIGNS, Stage.SCALE]


class TwoStageQAT(Callback):
    """Train one-bit weights in two stages: first latents and λ, then λ and every float parameter with frozen signs.

    The model is prepared in ``setup``, before the optimizer is made; its forward is never wrapped, and it is never
    converted: call ``pb.convert`` on the trained module. Every epoch logs ``qat/scale`` (λ), ``qat/flipped`` (the
    fraction of signs flipped in it) and ``qat/stage`` (0 warm-up, 1 signs, 2 scale). Stage and structures are in the
    checkpoint; a resumed run goes on in the stage it was in.

    Args:
        targets: pattern of parameter names of the LightningModule, such as ``"solver.layers.*.weight"``, to structure;
            None means the structure that the layer has. See `resolve_targets`.
        scheme: ``"native"``, ``"torchao"`` or ``"brevitas"``.
        sign_stage_start: when stage 1 begins, after a warm-up with float weights: an epoch (int), or a fraction of all
            training steps (float). 0 means no warm-up.
        scale_stage_start: when stage 2 begins, likewise.

    Raises:
        MisconfigurationException: a negative epoch, a fraction outside [0, 1], a fraction of a training without a
            known length, a model that was prepared with other structures, or a checkpoint of another scheme.

    Example:
        >>> from pibinn_plugin import BlockDiagonal
        >>> from pytorch_lightning import Trainer
        >>> callback = TwoStageQAT({"solver.layers.*.weight": BlockDiagonal(8)}, scale_stage_start=0.75)
        >>> trainer = Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        targets: Mapping[str, Structure | None],
        scheme: str = "native",
        sign_stage_start: int | float = 0,
        scale_stage_start: int | float = 0.75,
    ) -> None:
        for name, start in (("sign_stage_start", sign_stage_start), ("scale_stage_start", scale_stage_start)):
            if start < 0 or (isinstance(start, float) and start > 1):
                raise MisconfigurationException(
                    f"{name} must be an epoch (int, at least 0) or a fraction of training (float, 0 to 1); got {start!r}"
                )
        self.targets, self.scheme = dict(targets), scheme
        self.sign_stage_start, self.scale_stage_start = sign_stage_start, scale_stage_start
        self.stage: Stage | None = None
        self._signs_at_epoch_start: list[Tensor] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not any(True for _ in quantized_weights(pl_module)):
            prepare(pl_module, self.targets, self.scheme)
        self._check_starts(trainer)

    def _check_starts(self, trainer: pl.Trainer) -> None:
        fractions = [start for start in (self.sign_stage_start, self.scale_stage_start) if isinstance(start, float)]
        if fractions and trainer.max_steps == -1 and trainer.max_epochs == -1:
            raise MisconfigurationException(
                "a stage start is a fraction of training, but training has no end: set max_epochs or max_steps, or "
                "give the start as an epoch (int)"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter(self._stage_at(trainer), trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signs_at_epoch_start = [_local_signs(weight) for weight in quantized_weights(pl_module)]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter(self._stage_at(trainer), trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.stage == Stage.SCALE:
            # FSDP2 goes on filling the gradients of parameters frozen after it was set up: they must not be applied.
            for weight in quantized_weights(pl_module):
                weight.latent.grad = None

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = list(quantized_weights(pl_module))
        pairs = zip(self._signs_at_epoch_start, weights, strict=True)
        flipped = torch.stack([(before != _local_signs(weight)).sum() for before, weight in pairs]).sum().float()
        if any(hasattr(weight.latent, "to_local") for weight in weights):  # each rank sees its shards
            flipped = trainer.strategy.reduce(flipped, reduce_op="sum")
        nonzeros = sum(weight.quantizer.structure.nnz(weight.quantizer.shape) for weight in weights)
        value = global_scale(pl_module).value
        pl_module.log(
            "qat/scale", (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().abs().squeeze()
        )
        pl_module.log("qat/flipped", flipped / nonzeros)
        pl_module.log("qat/stage", float(_ORDER.index(self._current_stage())))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"stage": None if self.stage is None else str(self.stage), "scheme": self.scheme}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            raise MisconfigurationException(
                "the checkpoint was trained without TwoStageQAT: load its weights in the module and start a new fit"
            )
        if state["scheme"] != self.scheme:
            raise MisconfigurationException(
                f"the checkpoint was trained with scheme={state['scheme']!r}; got scheme={self.scheme!r}"
            )
        if state["stage"] is not None:
            # Here, not in on_train_start: DDP must be set up with the parameters that this stage trains.
            self.stage = Stage(state["stage"])
            self._apply_stage(pl_module)

    def _current_stage(self) -> Stage:
        assert self.stage is not None  # set in on_train_start
        return self.stage

    def _stage_at(self, trainer: pl.Trainer) -> Stage:
        if self._has_started(self.scale_stage_start, trainer):
            return Stage.SCALE
        return Stage.SIGNS if self._has_started(self.sign_stage_start, trainer) else Stage.WARM_UP

    @staticmethod
    def _has_started(start: int | float, trainer: pl.Trainer) -> bool:
        if isinstance(start, int):
            return trainer.current_epoch >= start
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise MisconfigurationException(
                f"a stage starts at the fraction {start} of training, whose length is unknown (an iterable dataset?): "
                f"set max_steps, or give the start as an epoch (int)"
            )
        return trainer.global_step >= start * steps

    def _enter(self, stage: Stage, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if stage == self.stage:
            return
        previous, self.stage = self.stage, stage
        self._apply_stage(pl_module)
        if previous == Stage.WARM_UP:
            self._start_scale(trainer, pl_module)
        if stage == Stage.SCALE and isinstance(trainer.strategy, DDPStrategy):
            # The reducer waits for a gradient of every parameter that needed one when it was built: build it anew.
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()

    def _apply_stage(self, pl_module: nn.Module) -> None:
        for weight in quantized_weights(pl_module):
            weight.quantizer.enabled = self.stage != Stage.WARM_UP
        if self.stage == Stage.SCALE:
            freeze_signs(pl_module)

    def _start_scale(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """λ of the warmed-up latents; and its optimizer state, which holds the zero gradients of the warm-up, anew."""
        scale = global_scale(pl_module)
        latents = (_structural(weight) for weight in quantized_weights(pl_module))
        scale.set(initial_scale(latents))
        for optimizer in trainer.optimizers:
            optimizer.state.pop(scale.value, None)


def _structural(weight: QuantizedWeight) -> Tensor:
    latent = weight.latent.detach()
    return weight.quantizer.structural(latent.full_tensor() if hasattr(latent, "full_tensor") else latent)


def _local_signs(weight: QuantizedWeight) -> Tensor:
    latent = weight.latent.detach()
    return (latent.to_local() if hasattr(latent, "to_local") else latent) >= 0
