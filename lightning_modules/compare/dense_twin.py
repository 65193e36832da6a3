"""The dense twin of a solver: the same layers without their structure, where the solver lets go of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from pibinn_plugin.structure import Dense, Structure
from pibinn_plugin.targets import Target, resolve_targets
from pibinn_plugin.weights import distinct

__all__ = ["RowError", "densify", "densify_weight"]


class RowError(MisconfigurationException):
    """A row of a comparison does not apply to this solver; the message says why."""


def densify(model: nn.Module, targets: Mapping[str, Structure | None]) -> dict[str, Structure | None]:
    """Replace compact layers by ``nn.Linear`` and grouped convolutions by full ones, in place, with equal outputs.

    Args:
        model: any module, not one of these layers itself.
        targets: as of `pibinn_plugin.prepare`; masks are dropped.

    Returns:
        The same targets by their full names, each with the structure `Dense`.

    Raises:
        RowError: no target has a structure to take away.

    Example:
        >>> from pibinn_plugin.nn import BlockDiagonalLinear
        >>> model = nn.Sequential(BlockDiagonalLinear(4, 4, 2))
        >>> densify(model, {"0.weight": None})
        {'0.weight': Dense()}
        >>> model[0].weight.shape
        torch.Size([4, 4])
    """
    resolved = resolve_targets(model, targets)
    if not any(_has_structure(target) for target in resolved):
        raise RowError("the weights are dense as they are, and fp32 without structure is the row fp32")
    for target in resolved:
        densify_weight(target)
    return {target.name: Dense() for target in resolved}


@torch.no_grad()
def densify_weight(target: Target) -> None:
    """Take the structure of one target away, in place in every module that holds it; a dense weight stays as it is."""
    if target.compact:
        _hold(target, target.structure.to_dense(target.parameter, target.shape))
        for place in distinct(target.places):
            place.module.__class__ = nn.Linear
    elif _is_grouped(target.module):
        _hold(target, _ungrouped(target.parameter, cast(int, target.module.groups)))
        for place in distinct(target.places):
            vars(place.module)["groups"] = 1
    elif _has_structure(target):
        mask = target.structure.mask(target.shape, target.parameter.device)
        target.parameter.masked_fill_(~mask, 0)  # it starts with the outputs of the twin with structure


def _hold(target: Target, weight: torch.Tensor) -> None:
    parameter = nn.Parameter(weight)
    for place in distinct(target.places):
        place.module.register_parameter(place.parameter_name, parameter)


def _has_structure(target: Target) -> bool:
    return target.structure.nnz(target.shape) < torch.Size(target.shape).numel() or _is_grouped(target.module)


def _is_grouped(module: Any) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1


def _ungrouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The full kernel ``(out, in, *size)`` of a grouped one ``(out, in / groups, *size)``."""
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], columns * groups, *weight.shape[2:])
    for group in range(groups):
        block = slice(group * rows, (group + 1) * rows)
        full[block, group * columns : (group + 1) * columns] = weight[block]
    return full
