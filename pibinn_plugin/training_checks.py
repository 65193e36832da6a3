"""What `TwoStageQAT` refuses before training, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn

from pibinn_plugin.schemes import scheme_of, schemes_in
from pibinn_plugin.sharding import is_sharded
from pibinn_plugin.targets import Targets
from pibinn_plugin.weights import global_scale, quantized_weights


def check_strategy(trainer: pl.Trainer, pl_module: pl.LightningModule, scheme: str) -> None:
    """Refuse strategies that cannot train latents and λ."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise MisconfigurationException(
            f"{type(strategy).__name__} keeps parameters in flat buffers, in which latents cannot be frozen: use "
            f"DDPStrategy, or ModelParallelStrategy (FSDP2)"
        )
    if isinstance(strategy, ModelParallelStrategy):
        ranks = strategy.device_mesh["tensor_parallel"].size()
        if ranks > 1:
            raise MisconfigurationException(
                f"tensor_parallel_size={ranks}: quantized layers cannot be split over ranks; use "
                f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1"
            )
        if (
            not scheme_of(scheme).loads_consolidated_shards
            and not strategy._save_distributed_checkpoint
            and pl_module.strict_loading
        ):
            raise MisconfigurationException(
                f"Lightning could not load a consolidated checkpoint of {scheme} layers again: use "
                f"ModelParallelStrategy(save_distributed_checkpoint=True)"
            )


def check_launcher(trainer: pl.Trainer, targets: Targets, scheme: str) -> None:
    """Refuse to prepare a module in processes whose results a module that is not prepared would not take."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            f"this strategy trains copies of the module in processes of its own, and loads the result into the module "
            f"that fit was given, which must be prepared for it: pibinn_plugin.prepare(module, {dict(targets)}, "
            f'"{scheme}") before fit, or strategy="ddp" in a script'
        )


def check_prepared(pl_module: nn.Module, targets: Targets, scheme: str) -> None:
    """Refuse a module that was prepared with other targets or another scheme."""
    weights = {weight.name: weight for weight in quantized_weights(pl_module)}
    matched: set[str] = set()
    for pattern, structure in targets.items():
        for name in (names := [name for name in weights if fnmatchcase(name, pattern)]):
            found = weights[name].structure
            if structure not in (None, found) or weights[name].scheme != scheme:
                raise MisconfigurationException(
                    f"the model was prepared before, with {name!r} as {found} in scheme={weights[name].scheme!r}; the "
                    f"callback asks for {structure} in scheme={scheme!r}"
                )
        if not names:
            raise MisconfigurationException(
                f"the model was prepared before, with {sorted(weights)}; the callback's target {pattern!r} matches "
                f"none of them"
            )
        matched.update(names)
    if left := sorted(weights.keys() - matched):
        raise MisconfigurationException(f"the model was prepared before, with {left}, which no target matches")


def check_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse a λ that no optimizer holds: it is registered at the root, where a list of layers does not reach it."""
    held = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    scale = global_scale(pl_module).value
    if held and scale.requires_grad and id(scale) not in held:
        name = next(name for name, parameter in pl_module.named_parameters() if parameter is scale)
        raise MisconfigurationException(
            f"the global scale {name!r} is in no optimizer and would not be trained: give the optimizer "
            f"self.parameters(), or add {{'params': [self.{name}]}} to its groups in configure_optimizers; "
            f"requires_grad_(False) on it keeps it as it is"
        )
    if held and (
        left := [
            weight.name
            for weight in quantized_weights(pl_module)
            if weight.latent.requires_grad and id(weight.latent) not in held
        ]
    ):
        rank_zero_warn(f"{left} are in no optimizer: their signs will not be trained")


def check_sharded(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse parameters that FSDP2 leaves whole: their gradients are never averaged over the ranks."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    parameters = {weight.name: weight.latent for weight in quantized_weights(pl_module)}
    parameters["pibinn_scale"] = global_scale(pl_module).value
    if left := [name for name, parameter in parameters.items() if not is_sharded(parameter)]:
        raise MisconfigurationException(
            f"{left} are not sharded, and the gradients of parameters that are not are never averaged over the ranks: "
            f"apply fully_shard to the LightningModule itself too, at the end of configure_model"
        )


def check_alone(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse several `TwoStageQAT` of one trainer."""
    if len(callbacks) > 1:
        raise MisconfigurationException(
            f"the trainer has {len(callbacks)} TwoStageQAT, and a network has one λ: name the targets of all in one"
        )


def check_checkpoint(state: Mapping[str, Any] | None, scheme: str, structures: Mapping[str, str]) -> None:
    """Refuse what a checkpoint says of its training where the scheme or the structures of the weights are others."""
    if state is None:
        raise _trained_without_callback()
    if state["scheme"] != scheme:
        raise _other_scheme(state["scheme"], scheme)
    # State dicts refuse other structures too, but FSDP2's way of loading does not look at them.
    for name in state["structures"].keys() | structures.keys():
        theirs, ours = state["structures"].get(name), structures.get(name)
        if theirs != ours:
            raise MisconfigurationException(
                f"the checkpoint holds {name!r} with the structure {theirs}, this model with {ours}; use the targets "
                f"it was trained with"
            )


def check_scheme_of_state_dict(
    scheme: str, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Refuse a state dict of another scheme, before torch lists all missing and all unexpected keys."""
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
