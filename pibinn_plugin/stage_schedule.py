"""When the stages of two-stage training begin."""

from __future__ import annotations

import pytorch_lightning as pl
from lightning_utilities.core.enums import StrEnum
from pytorch_lightning.utilities.exceptions import MisconfigurationException


class Stage(StrEnum):
    """What a training step updates."""

    WARM_UP = "warm_up"  # latents as float weights, without quantizers
    SIGNS = "signs"  # stage 1: latents behind the sign, λ and float parameters
    SCALE = "scale"  # stage 2: λ and float parameters; the signs are frozen


ORDER = [Stage.WARM_UP, Stage.SIGNS, Stage.SCALE]


class StageSchedule:
    """When stage 1 and stage 2 begin: each at an epoch (int), or after a fraction of all optimizer steps (float).

    Args:
        sign_stage_start: of stage 1.
        scale_stage_start: of stage 2.

    Raises:
        MisconfigurationException: a negative epoch, a fraction outside [0, 1], or stage 2 before stage 1.

    Example:
        >>> StageSchedule(0, 0.75).scale_stage_start
        0.75
    """

    def __init__(self, sign_stage_start: int | float, scale_stage_start: int | float) -> None:
        for name, start in (("sign_stage_start", sign_stage_start), ("scale_stage_start", scale_stage_start)):
            is_number = isinstance(start, int | float) and not isinstance(start, bool)
            if not is_number or not start >= 0 or (isinstance(start, float) and start > 1):
                raise MisconfigurationException(
                    f"{name} must be an epoch (int, at least 0) or a fraction of training (float, 0 to 1); got "
                    f"{start!r}"
                )
        if type(sign_stage_start) is type(scale_stage_start) and sign_stage_start > scale_stage_start:
            raise MisconfigurationException(
                f"stage 2 cannot begin before stage 1; got sign_stage_start={sign_stage_start!r} and "
                f"scale_stage_start={scale_stage_start!r}"
            )
        self.sign_stage_start, self.scale_stage_start = sign_stage_start, scale_stage_start

    def stage_at(self, trainer: pl.Trainer) -> Stage:
        """The stage that is due at the trainer's epoch and step."""
        if _has_started(self.scale_stage_start, trainer):
            return Stage.SCALE
        return Stage.SIGNS if _has_started(self.sign_stage_start, trainer) else Stage.WARM_UP

    def describe(self, trainer: pl.Trainer) -> str:
        """What the starts mean in this training, in a line: ``1`` and ``1.0`` look alike in a config.

        Raises:
            MisconfigurationException: a fraction of a training without a known length.
        """
        signs, scale = (self._describe(start, trainer) for start in (self.sign_stage_start, self.scale_stage_start))
        return f"TwoStageQAT: signs are trained {signs}, and frozen {scale}"

    @staticmethod
    def _describe(start: int | float, trainer: pl.Trainer) -> str:
        if start == 0:
            return "from the start"
        if isinstance(start, int):
            epochs = trainer.max_epochs or -1
            never = "never: " if 0 <= epochs <= start else ""
            return f"{never}from epoch {start}" + (f" of {epochs}" if epochs >= 0 else "")
        steps = _training_steps(trainer)
        never = "never: " if start == 1.0 else ""
        return f"{never}after {start * 100:g} % of {steps:g} steps (a fraction; an epoch is an integer)"


def _has_started(start: int | float, trainer: pl.Trainer) -> bool:
    if start == 0 or isinstance(start, int):
        return trainer.current_epoch >= start
    return trainer.global_step > 0 and trainer.global_step >= start * _training_steps(trainer)


def _training_steps(trainer: pl.Trainer) -> int | float:
    # In manual optimization every step of every optimizer counts, and how many they make is the user's choice.
    is_automatic = trainer.lightning_module.automatic_optimization
    steps = trainer.estimated_stepping_batches if is_automatic else trainer.max_steps
    if not 0 < steps < float("inf"):  # infinite without max_epochs, -1 for an iterable dataset, both without max_steps
        raise MisconfigurationException(
            "a stage start is a fraction of training, whose length is unknown (no max_epochs, only max_time, a dataset "
            "without a length, or manual optimization): set max_steps, or give the start as an epoch (int)"
        )
    return steps
