"""What a packed file knows of the operators of its solver, which are not in it: a few projections of their tensors.

An operator that is made from a seed keeps its entries out of state dicts. A solver with another operator would load,
and answer something else. Projections and no hash: entries that are computed may differ in the last bit between
machines, and another seed changes everything.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pibinn_plugin.errors import ArtifactError
from pibinn_plugin.structure.base import short

Probes = dict[str, list[float]]

_PROJECTIONS = 3
_TOLERANCE = 1e-4  # of the norm: rounding is far below, and one sign of 10^7 entries above


def probes_of(model: nn.Module) -> Probes:
    """The norm and some projections on random signs of each tensor of an operator that no state dict holds.

    An operator is an object with ``A`` and ``A_adjoint``: a module, of which the non-persistent buffers are taken, or
    an attribute of a module, of which the tensors are. Tensors on the meta device have no values and are left out.

    Example:
        >>> class Operator:
        ...     def __init__(self): self.matrix = torch.eye(2)
        ...     def A(self, x): return x
        ...     def A_adjoint(self, y): return y
        >>> layer = nn.Linear(2, 2)
        >>> layer.physics = Operator()
        >>> {name: len(numbers) for name, numbers in probes_of(layer).items()}
        {'physics.matrix': 4}
    """
    return {name: _probe(name, tensor) for name, tensor in _operator_tensors(model) if tensor.device.type != "meta"}


def check_operators(model: nn.Module, stored: Probes) -> None:
    """Raise `ArtifactError` where an operator of the model is not the one that a file was saved with."""
    own = dict(_operator_tensors(model))
    if missing := stored.keys() - own.keys():
        raise ArtifactError(f"the file was saved with the operators {short(sorted(missing))}, which the model lacks")
    for name, numbers in stored.items():
        if own[name].device.type == "meta":
            continue
        probe = _probe(name, own[name])
        bound = _TOLERANCE * max(probe[0], numbers[0]) + 1e-30
        if not all(abs(one - other) <= bound for one, other in zip(probe, numbers, strict=True)):
            raise ArtifactError(
                f"the operator {name!r} of the model is not that of the file: it has other entries; build it as it was "
                f"built for training (the same sizes and the same seed)"
            )


def checked_probes(value: Any) -> Probes:
    """Probes as a file states them. Raises `TypeError` for what are none."""
    for name, numbers in value.items():
        whole = type(name) is str and type(numbers) is list and len(numbers) == 1 + _PROJECTIONS
        if not whole or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise TypeError(f"{short(numbers)} are no projections of an operator")
    return dict(value)


def _operator_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if _is_operator(module):
            persistent = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
            for key, buffer in module.named_buffers():
                if id(buffer) not in persistent:
                    yield _joined(name, key), buffer
        for key, value in vars(module).items():
            if _is_operator(value) and not isinstance(value, nn.Module):
                tensors = {attribute: held for attribute, held in vars(value).items() if isinstance(held, Tensor)}
                yield from ((_joined(name, f"{key}.{attribute}"), held) for attribute, held in tensors.items())


def _is_operator(value: object) -> bool:
    return all(callable(getattr(type(value), name, None)) for name in ("A", "A_adjoint")) and hasattr(value, "__dict__")


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


@torch.no_grad()
def _probe(name: str, tensor: Tensor) -> list[float]:
    """The norm, and projections divided by nothing: both in double precision."""
    values = tensor.detach().cpu()
    values = (torch.view_as_real(values) if values.is_complex() else values).flatten().double()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    numbers = [values.norm().item()]
    for _ in range(_PROJECTIONS):
        signs = torch.randint(2, values.shape, generator=generator, dtype=torch.int8) * 2 - 1
        numbers.append((values * signs).sum().item())
    return [float(f"{number:.7g}") for number in numbers]
