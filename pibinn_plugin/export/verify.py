"""An exported file must compute what the network computes: compare the two, on the given inputs and on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pibinn_plugin.comparison import check_same_outputs
from pibinn_plugin.errors import ExportError

Runner = Callable[[tuple[Tensor, ...]], list[Tensor]]


def verify(run: Runner, network: Callable[..., Any], args: tuple[Tensor, ...], dynamic_batch: bool) -> None:
    """Run an exported file and the network on ``args`` and on a random batch, of another size if that is possible.

    Raises:
        ExportError: outputs differ by more than rounding, or in number or shape; or the file does not run.
    """
    generator = torch.Generator().manual_seed(0)
    others = tuple(_random_like(x, x.shape[0] + dynamic_batch, generator) for x in args)
    for inputs in (args, others):
        expected = network(*inputs)
        try:
            actual = run(inputs)
        except Exception as error:  # each format's runtime has its own errors
            shapes = [tuple(x.shape) for x in inputs]
            raise ExportError(f"the exported file does not run on inputs of shapes {shapes}: {error}") from error
        check_same_outputs(actual, expected, "the exported file", "the network", ExportError)


def _random_like(x: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random values of the mean and deviation of ``x``; for integers and booleans, values that occur in it."""
    shape = (batch, *x.shape[1:])
    if not x.is_floating_point():
        return x.flatten()[torch.randint(x.numel(), shape, generator=generator)]
    deviation = x.std(correction=0) if (x != x.flatten()[0]).any() else 1.0
    return (torch.randn(shape, generator=generator) * deviation + x.mean()).to(x.dtype)
