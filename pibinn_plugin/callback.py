"""`TwoStageQAT`: two-stage quantization-aware training inside ``Trainer.fit``."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from pibinn_plugin.averaged_networks import (
    follow_run,
    prepare_averages,
    restore_averages,
    start_averaged_scales,
    take_averaged_signs,
)
from pibinn_plugin.errors import TargetError
from pibinn_plugin.initialization import Initialization
from pibinn_plugin.quantizer import initial_scale
from pibinn_plugin.sharding import part_of, reshard, whole
from pibinn_plugin.stage_schedule import ORDER, Stage, StageSchedule
from pibinn_plugin.structure import Structure
from pibinn_plugin.training_checks import (
    check_alone,
    check_checkpoint,
    check_launcher,
    check_optimizers,
    check_prepared,
    check_scheme_of_state_dict,
    check_sharded,
    check_strategy,
)
from pibinn_plugin.weights import OneBitWeight, global_scale, quantized_weights
from pibinn_plugin.workflow import freeze_signs, prepare


class TwoStageQAT(Callback):
    """Train one-bit weights in two stages: first latents and λ, then λ and every float parameter with frozen signs.

    The model is prepared in ``setup``, before the optimizer is made, or after ``configure_model`` where that makes the
    layers; its forward is never wrapped, and it is never converted: call ``pb.convert`` on the trained module. From the
    start of stage 2 the signs are held apart from the latents, so that nothing that writes to parameters can change
    them. A latent that is not trainable when stage 2 begins is left as it is; those that are, are trainable again after
    ``fit``. Averages of the module that other callbacks keep are one-bit networks too (`averaged_networks`).

    Every epoch logs ``qat/scale`` (λ), ``qat/flipped`` (the fraction of signs flipped in it) and ``qat/stage`` (0
    warm-up, 1 signs, 2 scale). Stage and structures are in the checkpoint; a resumed run goes on in the stage it was
    in, also where a longer training would begin it later.

    Under ``ModelParallelStrategy`` (FSDP2), shard the targets' layers and the LightningModule itself, which holds λ.

    Args:
        targets: pattern of parameter names of the LightningModule, such as ``"solver.layers.*.weight"``, to structure;
            None means the structure that the layer has. See `resolve_targets`.
        scheme: ``"native"``, ``"torchao"`` or ``"brevitas"``.
        sign_stage_start: when stage 1 begins, after a warm-up with float weights: an epoch (int), or a fraction of all
            optimizer steps (float). 0 means no warm-up.
        scale_stage_start: when stage 2 begins, likewise. ``1`` is the second epoch, ``1.0`` the end of the training; a
            line printed when training starts says what was understood.
        initialization: where latents and λ start, such as a `SignsFromPairs`, which reads pairs from the training
            dataloader; at the start of a new training, not of a resumed one. None keeps the weights that the model has.

    Raises:
        MisconfigurationException: a negative epoch, a fraction outside [0, 1], stage 2 before stage 1, a fraction of a
            training without a known length, a model that was prepared otherwise, a checkpoint of another scheme or of
            other structures, a λ in no optimizer, two callbacks of this kind, an average of a part of the model from
            before it was prepared, or a strategy that cannot train λ.

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
        self.schedule = StageSchedule(sign_stage_start, scale_stage_start)
        self.targets, self.scheme = dict(targets), scheme
        self.initialization = initialization
        self.stage: Stage | None = None
        self._structures: dict[str, str] = {}
        self._signs_at_epoch_start: list[Tensor] = []
        self._frozen_here: list[OneBitWeight] = []  # trainable when stage 2 began
        self._restored: list[tuple[OneBitWeight, int]] = []  # frozen weights, and how often each latent was written to
        self._load_check: RemovableHandle | None = None

    # ------------------------------------------------------------------------------------------------- preparation

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_strategy(trainer, pl_module, self.scheme)
        check_alone([each for each in trainer.callbacks if isinstance(each, TwoStageQAT)])  # type: ignore[attr-defined]
        if quantized_weights(pl_module):
            check_prepared(pl_module, self.targets, self.scheme)
        else:
            if stage == "fit":
                check_launcher(trainer, self.targets, self.scheme)
            self._prepare(trainer, pl_module)
            self.stage = None
        prepare_averages(trainer, pl_module, self.targets, self.scheme)
        if stage == "fit" and trainer.global_step == 0:
            self.stage = None  # a new training, whatever module and callback were used for before
            for weight in quantized_weights(pl_module):
                if weight.latent.requires_grad:
                    weight.thaw()
        follow_run(trainer, pl_module)
        self._structures = {weight.name: weight.structure.to_json() for weight in quantized_weights(pl_module)}
        check = partial(check_scheme_of_state_dict, self.scheme)
        self._load_check = pl_module.register_load_state_dict_pre_hook(check)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            prepare(pl_module, self.targets, self.scheme)
        except TargetError:
            if not is_overridden("configure_model", pl_module):
                raise
            # Its layers may not be there yet. Lightning calls the hook again, and asks that it can be.
            with (
                trainer.strategy.tensor_init_context(),
                trainer.strategy.model_sharded_context(),
                trainer.precision_plugin.module_init_context(),
            ):
                pl_module.configure_model()
            prepare(pl_module, self.targets, self.scheme)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_latents(trainer, pl_module)
        self._let_go()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Leave the module as trainable as it was found, and without the hook."""
        if self._load_check is not None:
            self._load_check.remove()
            self._load_check = None
        for weight in self._frozen_here:
            weight.latent.requires_grad_(True)
        self._frozen_here = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not quantized_weights(pl_module):
            raise MisconfigurationException(
                f"configure_model of {type(pl_module).__name__} has made its layers anew: Lightning calls it more than "
                f"once, and asks that it returns where they are there already"
            )
        check_sharded(trainer, pl_module)
        check_optimizers(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------------ stages

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enable_quantizers(trainer, pl_module, self._stage_at(trainer))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rank_zero_info(self.schedule.describe(trainer))  # raises here, not when the first step is done
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

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if any(weight.latent._version != version for weight, version in self._restored):
            self._restore_latents(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_trial: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.stage != Stage.SCALE and self.schedule.scale_stage_start != 1.0 and not is_trial:
            is_warm_up = self.stage == Stage.WARM_UP
            rank_zero_warn(
                f"training has ended before stage 2 (scale_stage_start={self.schedule.scale_stage_start!r}): "
                + ("the weights are those of the float warm-up" if is_warm_up else "the signs were never frozen")
            )

    def _stage_at(self, trainer: pl.Trainer) -> Stage:
        due = self.schedule.stage_at(trainer)
        return max(due, self.stage or due, key=ORDER.index)

    def _enter_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (stage := self._stage_at(trainer)) != self.stage:
            self._enter(stage, trainer, pl_module)

    def _enter(self, stage: Stage, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        previous, self.stage = self.stage, stage
        self._enable_quantizers(trainer, pl_module, stage)
        if previous == Stage.WARM_UP and stage != Stage.WARM_UP:
            self._start_scale(trainer, pl_module)
            start_averaged_scales(trainer, pl_module)
        if previous not in (None, stage):
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, torch.optim.LBFGS):
                    optimizer.state.clear()  # its one history of all parameters would go on moving the latents
        if stage == Stage.SCALE:
            self._freeze(trainer, pl_module)

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._frozen_here = [weight for weight in quantized_weights(pl_module) if weight.latent.requires_grad]
        if not any(weight.is_frozen for weight in self._frozen_here):  # as those of a resumed run are
            take_averaged_signs(trainer, pl_module)
        freeze_signs(pl_module)
        follow_run(trainer, pl_module)
        self._restore_latents(trainer, pl_module)
        if isinstance(trainer.strategy, DDPStrategy) and self._frozen_here:
            # The reducer waits for a gradient of every parameter that needed one when it was built: build it anew.
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()

    def _restore_latents(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing reads the latents of frozen signs; but who looks at them, in a checkpoint say, finds those signs."""
        reshard(pl_module)
        frozen = [weight for weight in quantized_weights(pl_module) if weight.is_frozen]
        for weight in frozen:
            weight.restore()
        restore_averages(trainer, pl_module)
        self._restored = [(weight, weight.latent._version) for weight in frozen]

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
    def _enable_quantizers(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        for weight in quantized_weights(pl_module):
            weight.enable(stage != Stage.WARM_UP)
        follow_run(trainer, pl_module)

    @staticmethod
    def _start_scale(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """λ of the warmed-up latents; and its optimizer state, which holds the zero gradients of the warm-up, anew."""
        scale = global_scale(pl_module)
        latents = (weight.quantizer.structural(whole(weight.latent)) for weight in quantized_weights(pl_module))
        scale.set(initial_scale(latents))
        for optimizer in trainer.optimizers:
            state = optimizer.state.pop(scale.value, None)
            # torch 2.11 makes the state of this one when it makes the optimizer, and never again.
            if state is not None and isinstance(optimizer, torch.optim.Adagrad):
                start = optimizer.defaults["initial_accumulator_value"]
                optimizer.state[scale.value] = {"step": state["step"].zero_(), "sum": state["sum"].fill_(start)}

    # ----------------------------------------------------------------------------------------------------- metrics

    def _remember_signs(self, pl_module: nn.Module) -> None:
        reshard(pl_module)
        self._signs_at_epoch_start = [_signs(weight) for weight in quantized_weights(pl_module)]

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.stage is not None  # set in on_train_start
        self._restore_latents(trainer, pl_module)
        pairs = zip(self._signs_at_epoch_start, quantized_weights(pl_module), strict=True)
        # Outside the structure nothing has a sign, but an optimizer with weight decay moves latents there too.
        flips = [
            weight.quantizer.structural(whole(before) != whole(_signs(weight))).flatten() for before, weight in pairs
        ]
        scale = whole(global_scale(pl_module).value.detach()).abs().squeeze()
        # The same on every rank; sync_dist says so to Lightning, which warns otherwise.
        pl_module.log("qat/scale", scale, sync_dist=True)
        pl_module.log("qat/flipped", torch.cat(flips).float().mean(), sync_dist=True)
        pl_module.log("qat/stage", float(ORDER.index(self.stage)), sync_dist=True)

    # ------------------------------------------------------------------------------------------------- checkpoints

    # Not in `state_dict`: of two callbacks with one, Lightning speaks before `setup` can say that a network has one λ.
    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restore_latents(trainer, pl_module)  # in place: the checkpoint's tensors are those of the module
        checkpoint.setdefault("callbacks", {})[self.state_key] = {
            "stage": None if self.stage is None else self.stage.value,
            "scheme": self.scheme,
            "structures": self._structures,
        }

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["callbacks"].get(self.state_key)
        check_checkpoint(state, self.scheme, self._structures)
        if state["stage"] is not None:
            # Frozen in on_train_start only: until then, optimizers are made and their states loaded.
            self.stage = Stage(state["stage"])
            self._enable_quantizers(trainer, pl_module, self.stage)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _say_whether_warm_up(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _say_whether_warm_up(pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            _say_whether_warm_up(pl_module)


def _say_whether_warm_up(pl_module: nn.Module) -> None:
    if not all(weight.quantizer.enabled for weight in quantized_weights(pl_module)):
        rank_zero_warn(
            "these are the weights of the float warm-up: what is computed with them is not what a one-bit network "
            "gives, and pibinn_plugin.convert refuses them; take a checkpoint of a later epoch"
        )


def _signs(weight: OneBitWeight) -> Tensor:
    """Where the signs are +1, in the shape of the latent and on the ranks that hold it."""
    signs = weight.quantizer.signs
    return weight.latent.detach() >= 0 if signs is None else part_of(signs >= 0, weight.latent)
