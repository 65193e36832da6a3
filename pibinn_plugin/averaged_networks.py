"""Averages of the trained network that other callbacks keep (weight averaging, EMA, SWA): one-bit networks too.

What an average of one-bit networks means: λ, the float parameters and, until stage 2, the latents are averaged, and the
averaged network has the signs of its averaged latents. When stage 2 begins, the signs are decided once, for the run and
its averages: those of the averaged latents where averaging has begun, else those of the run. λ and the floats of
stage 2 are then trained, and averaged, for the signs that they are used with. What is evaluated and saved is a one-bit
network in every stage.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pibinn_plugin.sharding import assign, whole
from pibinn_plugin.targets import Targets
from pibinn_plugin.weights import OneBitWeight, global_scale, quantized_weights, uncompiled
from pibinn_plugin.workflow import prepare


def averaged_networks(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[tuple[pl.Callback, nn.Module]]:
    """The copies of a module that the trainer's callbacks hold, with the callback that holds each."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for value in vars(callback).values():
            if isinstance(value, nn.Module):
                network = uncompiled(value.module if isinstance(value, AveragedModel) else value)
                if type(network) is type(pl_module) and network is not pl_module:
                    yield callback, network


def prepare_averages(trainer: pl.Trainer, pl_module: pl.LightningModule, targets: Targets, scheme: str) -> None:
    """Prepare the copies that were made before the module was prepared, whatever the order of the callbacks.

    Raises:
        MisconfigurationException: an average of a part of the module, made before the part was prepared: its parameters
            have another order, and would be averaged with those of others.
    """
    for _, network in averaged_networks(trainer, pl_module):
        if not quantized_weights(network):
            prepare(network, targets, scheme)
    held = [(name, module) for name, module in pl_module.named_modules() if isinstance(module, AveragedModel)]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        held += [
            (f"{type(callback).__name__}.{name}", value)
            for name, value in vars(callback).items()
            if isinstance(value, AveragedModel)
        ]
    unprepared = [(name, average.module) for name, average in held if not quantized_weights(average)]
    if not unprepared:
        return
    with_targets = {type(module) for module in pl_module.modules() if quantized_weights(module)}
    for name, network in unprepared:
        if type(network) in with_targets:
            raise MisconfigurationException(
                f"{name} averages a {type(network).__name__} that has targets, but is a copy from before they were "
                f"prepared: average the whole LightningModule by a callback (WeightAveraging), or make the "
                f"AveragedModel in configure_optimizers"
            )


def take_averaged_signs(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Give the latents of the run the values of those of the first average that has begun."""
    for callback, network in averaged_networks(trainer, pl_module):
        holders = [callback, *(each for each in vars(callback).values() if isinstance(each, AveragedModel))]
        if any(int(getattr(holder, "n_averaged", None) or 0) > 0 for holder in holders):
            for own, theirs in _pairs(pl_module, network):
                assign(theirs.latent, whole(own.latent.detach()))
            return


def follow_run(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Bring every average into the stage of the run; when the run's signs are frozen, it takes them."""
    for _, network in averaged_networks(trainer, pl_module):
        for own, theirs in _pairs(pl_module, network):
            own.enable(theirs.quantizer.enabled)
            if not theirs.is_frozen:
                own.thaw()
            elif not own.is_frozen:
                own.freeze(theirs.packed)
                assign(own.latent, whole(theirs.latent.detach()))


def restore_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Give the latents of every average their frozen signs back."""
    for _, network in averaged_networks(trainer, pl_module):
        for weight in quantized_weights(network):
            if weight.is_frozen:
                weight.restore()


@torch.no_grad()
def start_averaged_scales(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """After the warm-up, in which λ meant nothing, averages go on from the λ that the run starts with."""
    scale = whole(global_scale(pl_module).value.detach()).abs().item()
    for _, network in averaged_networks(trainer, pl_module):
        global_scale(network).set(scale)


def _pairs(pl_module: nn.Module, network: nn.Module) -> Iterator[tuple[OneBitWeight, OneBitWeight]]:
    """The weights of an average, each with that of the run."""
    weights = {weight.name: weight for weight in quantized_weights(pl_module)}
    for own in quantized_weights(network):
        yield own, weights[own.name]
