r"""How far the output of any solver moves with y and with one flipped sign, as found at test examples.

No form of the iteration is assumed, and so nothing is proved: what is printed is a lower bound of the worst case.

- *y*: the largest ‖x̂' - x̂‖ / ‖y' - y‖ for a change of a thousandth of ‖y‖ at each example, by power iteration: of the
  changes of the output, the gradient gives the next change of y.
- *a flipped sign*: of each weight the few signs whose flip should change the output most, by the derivative: the
  mean of (∂⟨v, x̂⟩ / ∂V)² over random signs v is ‖∂x̂ / ∂V‖² for each entry. Each is flipped in the network, and
  flipped back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.analysis.network import CompactWeight, one_bit_weights
from pibinn_plugin.tables import text_table

__all__ = ["Sensitivity", "sensitivity"]

_ITERATIONS, _PROBES, _FLIPS = 20, 4, 4
_STEP = 1e-3  # of the length of y


@dataclass(frozen=True)
class Sensitivity:
    """What was found at some examples.

    Args:
        gain: the largest ‖x̂' - x̂‖ / ‖y' - y‖ for a small change of y.
        mean_gain: the mean over the examples.
        flips: by weight, the largest ‖x̂' - x̂‖ / ‖x̂‖ of an example by one flipped sign.
        examples: how many.
    """

    gain: float
    mean_gain: float
    flips: dict[str, float]
    examples: int

    def __str__(self) -> str:
        rows = [[name, f"{moved:.3%}"] for name, moved in self.flips.items()]
        return (
            f"A change of y by a thousandth of its length moves the output by up to {self.gain:.4g} times as much "
            f"({self.mean_gain:.4g} in the mean),\nthe largest found at {self.examples} test examples.\n"
            + text_table(("weight", "one flipped sign moves the output by"), rows, left_columns=1)
            + "Largest found, of the flips that by the derivative matter most: a lower bound of the worst case.\n"
        )


def sensitivity(model: nn.Module, y: Tensor) -> Sensitivity:
    """Search for what moves the output of a prepared network most.

    Args:
        model: prepared, on the CPU; changed and changed back.
        y: measurements of some examples, the first dimension that of the examples.

    Example:
        >>> from pibinn_plugin import prepare
        >>> model = prepare(nn.Linear(2, 2, bias=False), {"weight": None})
        >>> with torch.no_grad():
        ...     _ = model.parametrizations.weight.original.copy_(torch.eye(2))  # all signs +1
        ...     model.pibinn_scale.set(0.5)
        >>> found = sensitivity(model, torch.ones(1, 2))
        >>> round(found.gain, 4), found.flips  # one of two equal outputs vanishes
        (1.0, {'weight': 0.7071...})
    """
    gains = _gains(model, y)
    return Sensitivity(float(gains.max()), float(gains.mean()), _flips(model, y), len(y))


def _gains(solver: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """The largest ratio found for each example."""
    direction = _unit(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y))
    step = _STEP * y.flatten(1).norm(dim=1).clamp_min(torch.finfo(y.dtype).tiny).view(-1, *[1] * (y.dim() - 1))
    y = y.detach().requires_grad_()
    output = solver(y)
    gain = y.new_zeros(len(y))
    for _ in range(_ITERATIONS):
        with torch.no_grad():
            # Not by forward differentiation: kernels of sparse products have none.
            moved = (solver(y + step * direction) - output) / step.view(-1, *[1] * (output.dim() - 1))
        gain = torch.maximum(gain, moved.flatten(1).norm(dim=1))
        (gradient,) = torch.autograd.grad(output, y, moved, retain_graph=True)
        direction = _unit(gradient)
    return gain


def _unit(values: Tensor) -> Tensor:
    norms = values.flatten(1).norm(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    return values / norms.view(-1, *[1] * (values.dim() - 1))


def _flips(model: nn.Module, y: Tensor) -> dict[str, float]:
    weights = one_bit_weights(model)
    latents = [weight.parameter for weight in weights if weight.parameter is not None]
    trainable = [latent.requires_grad for latent in latents]
    for latent in latents:
        latent.requires_grad_(True)
    output = model(y)
    expected, generator = output.detach(), torch.Generator().manual_seed(0)
    importance = [torch.zeros_like(latent) for latent in latents]
    for _ in range(_PROBES):
        signs = (torch.randint(2, output.shape, generator=generator) * 2 - 1).to(output)
        gradients = torch.autograd.grad(output, latents, signs, retain_graph=True, allow_unused=True)
        for total, gradient in zip(importance, gradients, strict=True):
            total += 0 if gradient is None else gradient.square()
    for latent, flag in zip(latents, trainable, strict=True):
        latent.requires_grad_(flag)
    return {
        weight.name: _largest_change(model, y, expected, weight, total)
        for weight, total in zip(weights, importance, strict=True)
    }


@torch.no_grad()
def _largest_change(model: nn.Module, y: Tensor, expected: Tensor, weight: CompactWeight, importance: Tensor) -> float:
    assert weight.parameter is not None  # a prepared model has latents
    flat = weight.parameter.view(-1)
    largest = 0.0
    lengths = expected.flatten(1).norm(dim=1).clamp_min(torch.finfo(expected.dtype).tiny)
    for entry in importance.flatten().topk(min(_FLIPS, flat.numel())).indices.tolist():
        before = flat[entry].item()
        flat[entry] = -before if before else -1.0  # the sign of 0 is +1
        largest = max(largest, float(((model(y) - expected).flatten(1).norm(dim=1) / lengths).max()))
        flat[entry] = before
    return largest
