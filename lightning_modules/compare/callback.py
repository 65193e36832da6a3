"""`BaselineQAT`: quantization-aware training of a baseline, the twin of `TwoStageQAT` in a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_modules.compare.baselines import (
    BaselineQuantizer,
    ChannelWiseSign,
    FloatWeight,
    HalfWeight,
    Int8Weight,
    LayerWiseSign,
    TernaryAbsMean,
    TernaryTWN,
    baseline_weights,
)
from lightning_modules.compare.dense_twin import RowError, densify
from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.initialization import (
    Initialization,
    StartsFloatWeights,
    operator_entries,
)
from pibinn_plugin.schemes import scheme_of
from pibinn_plugin.sharding import assign
from pibinn_plugin.structure import Structure
from pibinn_plugin.targets import resolve_targets
from pibinn_plugin.weights import distinct

__all__ = ["BASELINES", "FIXED", "BaselineQAT", "attach_baseline"]

# Quantizer of a row, as a comparison names it, to what stands in front of each weight.
BASELINES: dict[str, type[BaselineQuantizer]] = {
    "fp32_dense": FloatWeight,
    "fp32": FloatWeight,
    "fp16": HalfWeight,
    "int8": Int8Weight,
    "ternary_twn": TernaryTWN,
    "ternary_b158": TernaryAbsMean,
    "channel_wise": ChannelWiseSign,
    "layer_wise": LayerWiseSign,
    "parq": LayerWiseSign,
    "zero_bit": FloatWeight,
    "oracle": FloatWeight,
}
FIXED = ("zero_bit", "oracle")  # those that train no weights


Start = Callable[[nn.Module, Mapping[str, Structure | None]], None]


def attach_baseline(
    model: nn.Module, targets: Mapping[str, Structure | None], quantizer: str, start: Start | None = None
) -> None:
    """Put baseline quantizers in front of the target weights of a model, in place.

    ``fp32_dense`` takes every structure away first; ``zero_bit`` freezes the weights at their initial values, and
    ``oracle`` where ``start`` puts them, at the operator that the others have to learn.

    Args:
        model: any module.
        targets: as of `pibinn_plugin.prepare`; for ``zero_bit`` there may be none, in a solver that learns no weights.
        quantizer: a key of `BASELINES`.
        start: sets the float weights that the targets name, before they are quantized.

    Raises:
        TargetError, StructureError: as by `pibinn_plugin.prepare` with its native scheme.
        RowError: the baseline does not apply to these targets.
        MisconfigurationException: no such quantizer.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> attach_baseline(model, {"weight": None}, "layer_wise")
        >>> model.weight.abs().unique().numel()
        1
    """
    if quantizer not in BASELINES:
        raise MisconfigurationException(f"unknown quantizer {quantizer!r}; expected one of {', '.join(BASELINES)}")
    if quantizer == "fp32_dense":
        targets = densify(model, targets)
    resolved = resolve_targets(model, targets) if targets or quantizer != "zero_bit" else []
    native = scheme_of("native")
    for target in resolved:  # all checks come before the first change: an error leaves the weights as they were
        for place in distinct(target.places):
            native.check(target, place)
        if quantizer == "parq" and not target.compact and target.structure.nnz(target.shape) < target.parameter.numel():
            raise RowError(f"PARQ quantizes whole tensors, and {target} is masked; use a compact layer")
    if start is not None and quantizer != "zero_bit":
        start(model, targets)
    for target in resolved:
        for place in distinct(target.places):
            parametrize.register_parametrization(place.module, place.parameter_name, BASELINES[quantizer](target))
    for _, latent, front in baseline_weights(model):
        if quantizer in FIXED:
            latent.requires_grad_(False)
        elif quantizer == "parq":  # follows mean|V|, by an optimizer of its own
            front.requires_grad_(False)


def _start_at_operator(data: pl.LightningDataModule, model: nn.Module, targets: Mapping[str, Structure | None]) -> None:
    """Set the weights to the operator that the data are measured with."""
    for target in resolve_targets(model, targets):
        try:
            entries = operator_entries(getattr(data, "operator", None), target.structure, target.shape)
        except (PIBiNNError, ValueError) as error:
            raise RowError(f"{target} is not the operator of {type(data).__name__}: {error}") from error
        assign(target.parameter, entries if target.compact else target.structure.to_dense(entries, target.shape))


class BaselineQAT(Callback):
    """Train a baseline on the targets of `TwoStageQAT`: the same weights, structures and float warm-up.

    The quantizers are put in front of the weights in ``setup``, before the optimizer is made. The latents train to the
    last step: baselines have no second stage.

    Args:
        targets: pattern of parameter names of the LightningModule to structure, as of `TwoStageQAT`.
        quantizer: a key of `BASELINES`; ``parq`` also needs the callback `lightning_modules.compare.parq.PARQ`.
        quantization_start: an epoch (int), or a fraction of all optimizer steps (float). Until then the latents train
            as float weights.
        initialization: that of `TwoStageQAT`; the baseline starts from the same data, and the same scale where that
            is known. ``zero_bit`` does not, and ``oracle`` starts at the operator that the data module has.
        solution: what it starts at, of the ``solutions`` that the initialization has.

    Raises:
        MisconfigurationException: no such quantizer, a model prepared otherwise, or a checkpoint of another quantizer.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> callback = BaselineQAT({"solver.layers.*.weight": None}, "ternary_b158")
        >>> trainer = Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        targets: Mapping[str, Structure | None],
        quantizer: str,
        quantization_start: int | float = 0,
        initialization: Initialization | None = None,
        solution: str = "box",
    ) -> None:
        if initialization is not None and not isinstance(initialization, StartsFloatWeights):
            raise MisconfigurationException(
                f"a baseline cannot start from a {type(initialization).__name__}, which has no start_float_weights: "
                f"use SignsFromPairs or a subclass, or start the solver's own weights at the operator and leave "
                f"qat.initialization out"
            )
        self.targets, self.quantizer, self.quantization_start = dict(targets), quantizer, quantization_start
        self.initialization, self.solution = initialization, solution

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        attached = [quantizer for _, _, quantizer in baseline_weights(pl_module)]
        if not attached:
            start: Start | None = None
            if stage == "fit" and trainer.ckpt_path is None:
                if self.quantizer == "oracle" and self.initialization is None:
                    raise RowError("the weights stand for no unknown operator: the config starts none from pairs")
                if self.quantizer == "oracle":
                    start = partial(_start_at_operator, trainer.datamodule)  # type: ignore[attr-defined]
                elif self.initialization is not None:
                    start = partial(self._start_from_data, trainer)
            attach_baseline(pl_module, self.targets, self.quantizer, start)
        elif not all(type(quantizer) is BASELINES[self.quantizer] for quantizer in attached):
            raise MisconfigurationException(
                f"the model was prepared before, with {type(attached[0]).__name__}; the callback asks for "
                f"{self.quantizer!r}"
            )

    def _start_from_data(self, trainer: pl.Trainer, model: nn.Module, targets: Mapping[str, Structure | None]) -> None:
        assert self.initialization is not None
        named = {
            target.name: target.structure
            for target in resolve_targets(model, targets)
            if fnmatchcase(target.name, self.initialization.weights)
        }
        # Lightning has attached the data and called its setup before that of callbacks.
        batches = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        self.initialization.start_float_weights(model, named, batches, self.solution)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enable(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enable(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enable(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for _, latent, quantizer in baseline_weights(pl_module):
            quantizer.switch(latent, True)  # PARQ's weights have their two values by now

    def _enable(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self.quantization_start, int):
            has_started = trainer.current_epoch >= self.quantization_start
        else:
            has_started = trainer.global_step >= self.quantization_start * trainer.estimated_stepping_batches
        for _, latent, quantizer in baseline_weights(pl_module):
            # PARQ's optimizer quantizes, not the forward.
            quantizer.switch(latent, has_started and self.quantizer != "parq")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"quantizer": self.quantizer}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        theirs = checkpoint["callbacks"].get(self.state_key, {}).get("quantizer")
        if theirs != self.quantizer:
            raise MisconfigurationException(
                f"the checkpoint was trained with the quantizer {theirs!r}; got {self.quantizer!r}"
            )
