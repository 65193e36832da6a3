"""Networks of the committed configurations, with random signs and scalars in the place of trained ones."""

from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.workflow import quantized_weights

CONFIGS = Path(__file__).parents[2] / "configs"
# name of the configuration -> shape of one input
INPUTS = {"eeg_eog": (512,), "calibration": (256,), "sparse_recovery": (256,)}


def solver_of(name):
    """The solver that a configuration describes, and its targets."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    parser = ArgumentParser()
    parser.add_subclass_arguments(nn.Module, "solver")
    solver = parser.instantiate_classes(parser.parse_object({"solver": config["model"]["solver"]})).solver
    return solver, {key.removeprefix("solver."): value for key, value in config["qat"]["targets"].items()}


def config_network(name):
    """A prepared network and one input; no two weights and no two scalars of it are alike."""
    torch.manual_seed(0)
    model, targets = solver_of(name)
    pb.prepare(model.eval(), targets)
    scales = [module.value for module in model.modules() if isinstance(module, GlobalScale)]
    latents = [weight.latent for weight in quantized_weights(model)]
    with torch.no_grad():
        for latent in latents:
            latent.uniform_(-1, 1)
        for parameter in model.parameters():
            if not any(parameter is known for known in (*latents, *scales)):
                parameter *= 1 + 0.05 * torch.rand_like(parameter)
    return model, torch.randn(1, *INPUTS[name])
