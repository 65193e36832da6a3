"""Faults of two-stage training: the callback, its schedule, what it refuses, and the averages that follow it."""

from fault import Fault

RUN = "callback callback_trainer"

FAULTS = [
    Fault("stage_schedule.py", "and not isinstance(start, bool)", "", "callback callback_config callback_trainer"),
    Fault("stage_schedule.py", "or (isinstance(start, float) and start > 1)", "", "callback callback_config"),
    Fault("stage_schedule.py", "not start >= 0", "start < 0", "callback callback_config callback_trainer"),
    Fault("stage_schedule.py", "and sign_stage_start > scale_stage_start:", "and False:", "callback callback_config"),
    Fault("stage_schedule.py", "return trainer.current_epoch >= start", "return trainer.current_epoch > start", RUN),
    Fault(
        "stage_schedule.py",
        "trainer.global_step >= start * _training_steps(trainer)",
        "trainer.global_step > start * _training_steps(trainer)",
        RUN,
    ),
    Fault("stage_schedule.py", "if start == 0 or isinstance(start, int):", "if isinstance(start, int):", RUN),
    Fault("stage_schedule.py", 'if not 0 < steps < float("inf"):', 'if not steps < float("inf"):', RUN),
    Fault(
        "stage_schedule.py",
        "trainer.estimated_stepping_batches if is_automatic else trainer.max_steps",
        "trainer.estimated_stepping_batches",
        RUN,
    ),
    Fault("stage_schedule.py", 'never = "never: " if 0 <= epochs <= start else ""', 'never = ""', RUN),
    Fault("stage_schedule.py", "            return Stage.SCALE\n", "            return Stage.SIGNS\n", RUN),
    Fault(
        "training_checks.py", "        if ranks > 1:\n", "        if False:\n", "distributed callback_trainer callback"
    ),
    Fault(
        "training_checks.py",
        "if structure not in (None, found) or weights[name].scheme != scheme:",
        "if structure not in (None, found):",
        RUN,
    ),
    Fault(
        "training_checks.py",
        "if structure not in (None, found) or weights[name].scheme != scheme:",
        "if weights[name].scheme != scheme:",
        RUN,
    ),
    Fault("training_checks.py", "        if not names:\n", "        if False:\n", RUN),
    Fault("training_checks.py", "    if left := sorted(weights.keys() - matched):\n", "    if left := []:\n", RUN),
    Fault(
        "training_checks.py",
        "if held and scale.requires_grad and id(scale) not in held:",
        "if False:",
        "callback_trainer",
    ),
    Fault(
        "training_checks.py",
        "scale.requires_grad and id(scale) not in held",
        "id(scale) not in held",
        "callback_trainer",
    ),
    Fault(
        "training_checks.py",
        "weight.latent.requires_grad and id(weight.latent) not in held",
        "False",
        "callback_trainer",
    ),
    Fault(
        "training_checks.py",
        "if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):",
        "if False:",
        "callback_trainer distributed",
    ),
    Fault(
        "averaged_networks.py",
        "        if not quantized_weights(network):\n",
        "        if False:\n",
        "callback_averaging",
    ),
    Fault(
        "averaged_networks.py",
        "        if type(network) in with_targets:\n",
        "        if False:\n",
        "callback_averaging",
    ),
    Fault("averaged_networks.py", 'int(getattr(holder, "n_averaged", None) or 0) > 0', "True", "callback_averaging"),
    Fault(
        "averaged_networks.py",
        "                assign(theirs.latent, whole(own.latent.detach()))\n",
        "                pass\n",
        "callback_averaging",
    ),
    Fault("training_checks.py", "    if len(callbacks) > 1:\n", "    if False:\n", RUN),
    Fault("callback.py", "            self._load_check.remove()\n", "            pass\n", RUN),
    Fault("callback.py", "            weight.latent.requires_grad_(True)\n", "            pass\n", RUN),
    Fault(
        "callback.py", "            check_prepared(pl_module, self.targets, self.scheme)\n", "            pass\n", RUN
    ),
    Fault(
        "callback.py",
        '        if stage == "fit" and trainer.global_step == 0:\n            self.stage = None',
        "        if False:\n            self.stage = None",
        RUN,
    ),
    Fault("callback.py", "        check_optimizers(trainer, pl_module)\n", "", "callback_trainer"),
    Fault(
        "callback.py",
        "        rank_zero_info(self.schedule.describe(trainer))  #",
        "        pass  #",
        "callback_trainer",
    ),
    Fault(
        "callback.py",
        "exception: BaseException) -> None:\n        self._let_go()\n",
        "exception: BaseException) -> None:\n        pass\n",
        RUN,
    ),
    Fault(
        "callback.py",
        "if self.stage is None and self.initialization is not None:",
        "if self.initialization is not None:",
        "initialization callback_checkpoints",
    ),
    Fault(
        "callback.py",
        "        if self.stage == Stage.SCALE:\n            # One may",
        "        if False:\n            # One may",
        "callback_optimizers " + RUN,
        harmless="frozen signs do not follow the latent, which is put back behind each batch",
    ),
    Fault(
        "callback.py",
        "if any(weight.latent._version != version for weight, version in self._restored):",
        "if False:",
        "callback_optimizers",
    ),
    Fault(
        "callback.py",
        "return max(due, self.stage or due, key=ORDER.index)",
        "return due",
        "callback_checkpoints callback_trainer callback",
    ),
    Fault(
        "callback.py",
        "        if previous == Stage.WARM_UP and stage != Stage.WARM_UP:\n",
        "        if False:\n",
        "callback callback_trainer",
    ),
    Fault(
        "callback.py",
        "state = optimizer.state.pop(scale.value, None)\n",
        "state = None\n",
        "callback callback_trainer callback_optimizers",
    ),
    Fault(
        "callback.py",
        "                    optimizer.state.clear()  #",
        "                    pass  #",
        "callback_optimizers callback",
    ),
    Fault("callback.py", "        freeze_signs(pl_module)\n", "", "callback_optimizers"),
    Fault("callback.py", "            trainer.strategy.configure_ddp()\n", "            pass\n", "distributed"),
    Fault(
        "callback.py", "            loader._iterator = None\n", "            pass\n", "initialization callback_trainer"
    ),
    Fault(
        "callback.py",
        "            batches = trainer.max_steps  # a stream may have no end\n",
        "            pass\n",
        "endless_stream",
    ),
    Fault("callback.py", "weight.enable(stage != Stage.WARM_UP)", "weight.enable(True)", "callback"),
    Fault(
        "callback.py",
        "scale = whole(global_scale(pl_module).value.detach()).abs().squeeze()",
        "scale = whole(global_scale(pl_module).value.detach()).squeeze()",
        "callback callback_trainer",
    ),
    Fault(
        "callback.py",
        "weight.quantizer.structural(whole(before) != whole(_signs(weight))).flatten()",
        "whole(before != _signs(weight)).flatten()",
        "callback callback_trainer",
    ),
    Fault(
        "callback.py",
        "        self._remember_signs(pl_module)  # a run resumed inside an epoch has no epoch start\n",
        "",
        "callback_checkpoints",
    ),
    Fault(
        "training_checks.py",
        "    if state is None:\n        raise _trained_without_callback()\n",
        "    if state is None:\n        return\n",
        "callback_checkpoints",
    ),
    Fault(
        "training_checks.py",
        '    if state["scheme"] != scheme:\n',
        "    if False:\n",
        "callback_checkpoints",
    ),
    Fault(
        "training_checks.py",
        "        if theirs != ours:\n",
        "        if False:\n",
        "callback_checkpoints",
    ),
    Fault(
        "callback.py",
        '            self.stage = Stage(state["stage"])\n',
        "            pass\n",
        "callback_checkpoints",
    ),
    Fault(
        "training_checks.py",
        "    if scheme not in found:\n",
        "    if False:\n",
        "callback_checkpoints",
    ),
    Fault(
        "callback.py",
        "    if not all(weight.quantizer.enabled for weight in quantized_weights(pl_module)):\n",
        "    if False:\n",
        "callback_trainer",
    ),
    Fault(
        "callback.py",
        "self.schedule.scale_stage_start != 1.0 and not is_trial",
        "not is_trial",
        "callback_trainer",
    ),
    Fault(
        "callback.py",
        '            if not is_overridden("configure_model", pl_module):\n',
        "            if True:\n",
        "callback callback_trainer distributed",
    ),
]
