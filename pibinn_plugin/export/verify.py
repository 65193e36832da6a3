"""An exported file must compute what the network computes: compare the two, on the given inputs and on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from pibinn_plugin.errors import ExportError

TOLERANCE = 1e-4  # of the largest output magnitude: what differs is the order of summation in float32

Runner = Callable[[tuple[Tensor, ...]], list[Tensor]]


def verify(run: Runner, packed: nn.Module, args: tuple[Tensor, ...], dynamic_batch: bool) -> None:
    """Run an exported file and the network on ``args`` and on a random batch, of another size if that is possible.

    Raises:
        ExportError: outputs differ by more than `TOLERANCE`, or in number or shape; or the file does not run.
    """
    generator = torch.Generator().manual_seed(0)
    others = tuple(_random_like(x, x.shape[0] + dynamic_batch, generator) for x in args)
    for inputs in (args, others):
        with torch.no_grad():
            expected = outputs_of(packed(*inputs))
        try:
            actual = run(inputs)
        except Exception as error:  # each format's runtime has its own errors
            shapes = [tuple(x.shape) for x in inputs]
            raise ExportError(f"the exported file does not run on inputs of shapes {shapes}: {error}") from error
        _compare(actual, expected)


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors that a network returned, a Brevitas ``QuantTensor`` by its value."""
    leaves = pytree.tree_leaves(result, is_leaf=lambda x: hasattr(x, "zero_point"))
    return [getattr(leaf, "value", leaf) for leaf in leaves]


def _compare(actual: list[Tensor], expected: list[Tensor]) -> None:
    shapes = [[tuple(y.shape) for y in outputs] for outputs in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the exported file returns shapes {shapes[0]}, the network {shapes[1]}")
    for number, (y, reference) in enumerate(zip(actual, expected, strict=True)):
        reference = reference.to(torch.float64)
        error = (y.to(torch.float64) - reference).abs().max().item()
        largest = reference.abs().max().item()
        if not error <= TOLERANCE * largest:  # also where one of them is NaN
            raise ExportError(
                f"output {number} of the exported file differs from the network's by {error:.2g}, where the largest "
                f"magnitude is {largest:.2g}; expected at most {TOLERANCE} of it"
            )


def _random_like(x: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random values of the mean and deviation of ``x``; for integers and booleans, values that occur in it."""
    shape = (batch, *x.shape[1:])
    if not x.is_floating_point():
        return x.flatten()[torch.randint(x.numel(), shape, generator=generator)]
    deviation = x.std(correction=0) if (x != x.flatten()[0]).any() else 1.0
    return (torch.randn(shape, generator=generator) * deviation + x.mean()).to(x.dtype)
