"""A network of every kind of layer that all three schemes take, prepared, and what it should compute."""

import torch
import torch.nn.functional as F
from torch import nn

from pibinn_plugin import global_scale, prepare
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear
from pibinn_plugin.quantizer import GlobalScale, quantize_sign
from pibinn_plugin.structure import BlockDiagonal, Mask
from pibinn_plugin.workflow import quantized_weights

SCHEMES = ("native", "torchao", "brevitas")
TARGETS = {
    "dense.weight": None,
    "masked.weight": BlockDiagonal(4),
    "compact.weight": None,
    "banded.weight": None,
    "conv.weight": BlockDiagonal(2),
    "any.weight": Mask(torch.eye(8).roll(1, 0) + torch.eye(8)),
}


class Solver(nn.Module):
    """Every kind of layer that all three schemes take, and float parameters between them."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 8)
        self.masked = nn.Linear(8, 8, bias=False)
        self.compact = BlockDiagonalLinear(8, 8, 4)
        self.banded = BandedLinear(8, 8, 1, 1, bias=False)
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.any = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.threshold = nn.Parameter(torch.tensor(0.1))

    def forward(self, y):
        x = F.softshrink(self.masked(self.dense(y)), 0.0) - self.threshold
        x = self.norm(self.banded(torch.tanh(self.compact(x))))
        return self.any(self.conv(x.unflatten(-1, (2, 4))).flatten(-2))


def solver(scheme, seed=0, dtype=torch.float32, targets=TARGETS):
    torch.manual_seed(seed)
    return prepare(Solver().to(dtype), targets, scheme)


def weights_by_reference(model):
    """By `quantizer.py`'s pure function, from the latents alone."""
    scale = next(module for module in model.modules() if isinstance(module, GlobalScale))()
    weights = {}
    for weight in quantized_weights(model):
        quantizer = weight.quantizer
        mask = None if quantizer.compact else quantizer.structure.mask(quantizer.shape)
        weights[weight.name] = quantize_sign(weight.latent, scale, mask)
    return weights


def float_twin(model):
    """A fresh float model that holds the weights ±λ of the prepared one as plain parameters."""
    twin = Solver().to(next(iter(model.parameters())).dtype)
    state = {name: value for name, value in model.state_dict().items() if name in twin.state_dict()}
    state |= {name: value.detach() for name, value in weights_by_reference(model).items()}
    twin.load_state_dict(state)
    return twin


def step(model, batch):
    model.zero_grad()
    output = model(batch)
    output.square().sum().backward()
    return output.detach(), global_scale(model).value.grad.clone()
