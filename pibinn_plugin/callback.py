"""`TwoStageQAT`: two-stage quantization-aware training inside ``Trainer.fit``."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.enums import StrEnum
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from pibinn_plugin.initialization import Initialization
from pibinn_plugin.quantizer import initial_scale
from pibinn_plugin.schemes import scheme_of, schemes_in
from pibinn_plugin.sharding import is_sharded, reshard, whole
from pibinn_plugin.structure import Structure
from pibinn_plugin.weights import OneBitWeight, global_scale, quantized_weights
from pibinn_plugin.workflow import freeze_signs, prepare


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
    checkpoint; a resumed run goes on in the stage it was in, also where a longer training would begin it later.

    Under ``ModelParallelStrategy`` (FSDP2), shard the targets' layers and the LightningModule itself, which holds λ.

    Args:
        targets: pattern of parameter names of the LightningModule, such as ``"solver.layers.*.weight"``, to structure;
            None means the structure that the layer has. See `resolve_targets`.
        scheme: ``"native"``, ``"torchao"`` or ``"brevitas"``.
        sign_stage_start: when stage 1 begins, after a warm-up with float weights: an epoch (int), or a fraction of all
            optimizer steps (float). 0 means no warm-up.
        scale_stage_start: when stage 2 begins, likewise.
        initialization: where latents and λ start, such as a `SignsFromPairs`, which reads pairs from the training
            dataloader; at the start of a new training, not of a resumed one. None keeps the weights that the model has.

    Raises:
        MisconfigurationException: a negative epoch, a fraction outside [0, 1], stage 2 before stage 1, a fraction of a
            training without a known length, a model that was prepared otherwise, a checkpoint of another scheme or of
            other structures, or a strategy that cannot train λ.

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
        initialization: Initialization | None = None,
    ) -> None:
        for name, start in (("sign_stage_start", sign_stage_start), ("scale_stage_start", scale_stage_start)):
            if start < 0 or (isinstance(start, float) and start > 1):
                raise MisconfigurationException(
                    f"{name} must be an epoch (int, at least 0) or a fraction of training (float, 0 to 1); got "
                    f"{start!r}"
                )
        if type(sign_stage_start) is type(scale_stage_start) and sign_stage_start > scale_stage_start:
            raise MisconfigurationException(
                f"stage 2 cannot begin before stage 1; got sign_stage_start={sign_stage_start!r} and "
                f"scale_stage_start={scale_stage_start!r}"
            )
        self.targets, self.scheme = dict(targets), scheme
        self.sign_stage_start, self.scale_stage_start = sign_stage_start, scale_stage_start
        self.initialization = initialization
        self.stage: Stage | None = None
        self._structures: dict[str, str] = {}
        self._signs_at_epoch_start: list[Tensor] = []
        self._load_check: RemovableHandle | None = None

    # ------------------------------------------------------------------------------------------------- preparation

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._check_strategy(trainer, pl_module)
        if quantized_weights(pl_module):
            self._check_prepared(pl_module)
        else:
            prepare(pl_module, self.targets, self.scheme)
            self.stage = None
        if stage == "fit":
            if self._has_fraction and trainer.max_epochs == trainer.max_steps == -1:
                raise _unknown_length()
            if trainer.global_step == 0:
                self.stage = None  # a new training, whatever this callback was used for before
            for weight in quantized_weights(pl_module):
                weight.latent.requires_grad_(True)  # until stage 2: optimizers are made of what is trainable
        weights = quantized_weights(pl_module)
        self._structures = {weight.name: weight.structure.to_json() for weight in weights}
        self.teardown(trainer, pl_module, stage)  # a run that failed has had none
        check = partial(_check_scheme_of_state_dict, self.scheme)
        self._load_check = pl_module.register_load_state_dict_pre_hook(check)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._load_check is not None:
            self._load_check.remove()
            self._load_check = None

    def _check_strategy(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} keeps parameters in flat buffers, in which latents cannot be "
                f"frozen: use DDPStrategy, or ModelParallelStrategy (FSDP2)"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            ranks = trainer.strategy.device_mesh["tensor_parallel"].size()
            if ranks > 1:
                raise MisconfigurationException(
                    f"tensor_parallel_size={ranks}: quantized layers cannot be split over ranks; use "
                    f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1"
                )
            if (
                not scheme_of(self.scheme).loads_consolidated_shards
                and not trainer.strategy._save_distributed_checkpoint
                and pl_module.strict_loading
            ):
                raise MisconfigurationException(
                    f"Lightning could not load a consolidated checkpoint of {self.scheme} layers again: use "
                    f"ModelParallelStrategy(save_distributed_checkpoint=True)"
                )

    def _check_prepared(self, pl_module: nn.Module) -> None:
        weights = {weight.name: weight for weight in quantized_weights(pl_module)}
        matched: set[str] = set()
        for pattern, structure in self.targets.items():
            for name in (names := [name for name in weights if fnmatchcase(name, pattern)]):
                found = weights[name].structure
                if structure not in (None, found) or weights[name].scheme != self.scheme:
                    raise MisconfigurationException(
                        f"the model was prepared before, with {name!r} as {found} in scheme={weights[name].scheme!r}; "
                        f"the callback asks for {structure} in scheme={self.scheme!r}"
                    )
            if not names:
                raise MisconfigurationException(
                    f"the model was prepared before, with {sorted(weights)}; the callback's target {pattern!r} matches "
                    f"none of them"
                )
            matched.update(names)
        if left := sorted(weights.keys() - matched):
            raise MisconfigurationException(f"the model was prepared before, with {left}, which no target matches")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            return
        parameters = {weight.name: weight.latent for weight in quantized_weights(pl_module)}
        parameters["pibinn_scale"] = global_scale(pl_module).value
        if left := [name for name, parameter in parameters.items() if not is_sharded(parameter)]:
            raise MisconfigurationException(
                f"{left} are not sharded, and the gradients of parameters that are not are never averaged over the "
                f"ranks: apply fully_shard to the LightningModule itself too, at the end of configure_model"
            )

    # ------------------------------------------------------------------------------------------------------ stages

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enable_quantizers(pl_module, self._stage_at(trainer))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._has_fraction:
            _training_steps(trainer)  # raises here, not when the first step is done
        if self.stage is None and self.initialization is not None:
            self._initialize(self.initialization, trainer, pl_module)
        self._enter(self._stage_at(trainer), trainer, pl_module)
        self._remember_signs(pl_module)  # a run resumed inside an epoch has no epoch start

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter_if_due(trainer, pl_module)
        self._remember_signs(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter_if_due(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.stage == Stage.SCALE:
            # One may be there in spite of requires_grad, such as from a hook of the user.
            for weight in quantized_weights(pl_module):
                weight.latent.grad = None

    @property
    def _has_fraction(self) -> bool:
        return any(isinstance(start, float) and start > 0 for start in (self.sign_stage_start, self.scale_stage_start))

    def _stage_at(self, trainer: pl.Trainer) -> Stage:
        due = Stage.WARM_UP
        if self._has_started(self.scale_stage_start, trainer):
            due = Stage.SCALE
        elif self._has_started(self.sign_stage_start, trainer):
            due = Stage.SIGNS
        return max(due, self.stage or due, key=_ORDER.index)

    @staticmethod
    def _has_started(start: int | float, trainer: pl.Trainer) -> bool:
        if start == 0 or isinstance(start, int):
            return trainer.current_epoch >= start
        return trainer.global_step > 0 and trainer.global_step >= start * _training_steps(trainer)

    def _enter_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (stage := self._stage_at(trainer)) != self.stage:
            self._enter(stage, trainer, pl_module)

    def _enter(self, stage: Stage, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        previous, self.stage = self.stage, stage
        self._enable_quantizers(pl_module, stage)
        if previous == Stage.WARM_UP and stage != Stage.WARM_UP:
            self._start_scale(trainer, pl_module)
        if previous not in (None, stage):
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, torch.optim.LBFGS):
                    optimizer.state.clear()  # its one history of all parameters would go on moving the latents
        latents = [weight.latent for weight in quantized_weights(pl_module)]
        were_trained = [latent.requires_grad for latent in latents]
        if stage == Stage.SCALE:
            freeze_signs(pl_module)
        else:
            for latent in latents:
                latent.requires_grad_(True)
        if isinstance(trainer.strategy, DDPStrategy) and were_trained != [latent.requires_grad for latent in latents]:
            # The reducer waits for a gradient of every parameter that needed one when it was built: build it anew.
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()

    @staticmethod
    def _initialize(initialization: Initialization, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Latents and λ from the batches of an epoch, the same on every rank."""
        reshard(pl_module)
        # A copy: persistent workers serve one iterator at a time, and that of the first epoch is made already.
        loader: Any = copy.copy(trainer.train_dataloader)
        if isinstance(loader, DataLoader):
            loader._iterator = None
        batches = trainer.num_training_batches
        if batches == float("inf") and trainer.max_steps >= 0:
            batches = trainer.max_steps  # a stream may have no end
        seen = loader if batches == float("inf") else itertools.islice(loader, int(batches))
        initialization(pl_module, seen, partial(trainer.strategy.reduce, reduce_op="sum"))

    @staticmethod
    def _enable_quantizers(pl_module: nn.Module, stage: Stage) -> None:
        for weight in quantized_weights(pl_module):
            weight.enable(stage != Stage.WARM_UP)

    @staticmethod
    def _start_scale(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """λ of the warmed-up latents; and its optimizer state, which holds the zero gradients of the warm-up, anew."""
        scale = global_scale(pl_module)
        latents = (weight.quantizer.structural(whole(weight.latent)) for weight in quantized_weights(pl_module))
        scale.set(initial_scale(latents))
        for optimizer in trainer.optimizers:
            optimizer.state.pop(scale.value, None)

    # ----------------------------------------------------------------------------------------------------- metrics

    def _remember_signs(self, pl_module: nn.Module) -> None:
        reshard(pl_module)
        self._signs_at_epoch_start = [_signs(weight) for weight in quantized_weights(pl_module)]

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.stage is not None  # set in on_train_start
        reshard(pl_module)
        pairs = zip(self._signs_at_epoch_start, quantized_weights(pl_module), strict=True)
        # Outside the structure nothing has a sign, but an optimizer with weight decay moves latents there too.
        flips = [weight.quantizer.structural(whole(before != _signs(weight))).flatten() for before, weight in pairs]
        scale = whole(global_scale(pl_module).value.detach()).abs().squeeze()
        # The same on every rank; sync_dist says so to Lightning, which warns otherwise.
        pl_module.log("qat/scale", scale, sync_dist=True)
        pl_module.log("qat/flipped", torch.cat(flips).float().mean(), sync_dist=True)
        pl_module.log("qat/stage", float(_ORDER.index(self.stage)), sync_dist=True)

    # ------------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        stage = None if self.stage is None else self.stage.value
        return {"stage": stage, "scheme": self.scheme, "structures": self._structures}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            raise _trained_without_callback()
        if state["scheme"] != self.scheme:
            raise _other_scheme(state["scheme"], self.scheme)
        # State dicts refuse other structures too, but FSDP2's way of loading does not look at them.
        for name in state["structures"].keys() | self._structures.keys():
            theirs, ours = state["structures"].get(name), self._structures.get(name)
            if theirs != ours:
                raise MisconfigurationException(
                    f"the checkpoint holds {name!r} with the structure {theirs}, this model with {ours}; use the "
                    f"targets it was trained with"
                )
        if state["stage"] is not None:
            # Frozen in on_train_start only: until then, optimizers are made and their states loaded.
            self.stage = Stage(state["stage"])
            self._enable_quantizers(pl_module, self.stage)


def _check_scheme_of_state_dict(
    scheme: str, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Before torch lists all keys that are missing and all that are unexpected."""
    found = schemes_in(state_dict)
    if not found:
        raise _trained_without_callback()
    if scheme not in found:
        raise _other_scheme(found.pop(), scheme)


def _trained_without_callback() -> MisconfigurationException:
    return MisconfigurationException(
        "the checkpoint was trained without TwoStageQAT: load its weights in the module and start a new fit"
    )


def _other_scheme(theirs: str, ours: str) -> MisconfigurationException:
    return MisconfigurationException(f"the checkpoint was trained with scheme={theirs!r}; got scheme={ours!r}")


def _unknown_length() -> MisconfigurationException:
    return MisconfigurationException(
        "a stage start is a fraction of training, whose length is unknown (no max_epochs, a dataset without a length, "
        "or manual optimization): set max_steps, or give the start as an epoch (int)"
    )


def _training_steps(trainer: pl.Trainer) -> int | float:
    # In manual optimization every step of every optimizer counts, and how many they make is the user's choice.
    is_automatic = trainer.lightning_module.automatic_optimization
    steps = trainer.estimated_stepping_batches if is_automatic else trainer.max_steps
    if not 0 < steps < float("inf"):  # -1 for an iterable dataset without max_steps
        raise _unknown_length()
    return steps


def _signs(weight: OneBitWeight) -> Tensor:
    return weight.latent.detach() >= 0
