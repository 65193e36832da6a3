"""Packed weights back to the float weights that they stand for: what exporters know how to read."""

from __future__ import annotations

from torch import nn

from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import stop_multiplying_bits
from pibinn_plugin.parametrized import stop_parametrizing
from pibinn_plugin.structure import BlockDiagonal
from pibinn_plugin.targets import Target
from pibinn_plugin.weights import Place, distinct, packed_weights


def with_float_weights(packed: nn.Module) -> list[Target]:
    """Turn a packed model into its float twin, in place: ``λ · S ⊙ M`` as parameters of the modules that read it.

    Returns:
        The weights, in their places.
    """
    targets = []
    for weight in packed_weights(packed):
        value = nn.Parameter(weight.packed.weight(weight.rule.scale().detach(), weight.compact, weight.dtype), False)
        for place in distinct(weight.places):
            stop_multiplying_bits(place.module)
            stop_parametrizing(place.module, place.parameter_name)
            place.module.register_parameter(place.parameter_name, value)
        targets.append(Target(weight.places, weight.structure, weight.shape, weight.compact))
    return targets


def to_dense_layer(target: Target) -> Target:
    """Turn the compact layers of a float weight into ``nn.Linear``, in place."""
    dense = nn.Parameter(target.structure.to_dense(target.parameter.detach(), target.shape), False)
    for place in distinct(target.places):
        place.module.__class__ = nn.Linear
        place.module.register_parameter("weight", dense)
    return Target(target.places, target.structure, target.shape, False)


def is_stock_compact(place: Place) -> bool:
    """Whether a place is the weight of a `CompactLinear` itself, not of a subclass."""
    return type(place.module) is CompactLinear and place.parameter_name == "weight"


def has_empty_blocks(structure: object) -> bool:
    """Whether a block has no row or no column, as where an operator does not see an unknown."""
    return isinstance(structure, BlockDiagonal) and 0 in (*(structure.rows or ()), *(structure.columns or ()))
