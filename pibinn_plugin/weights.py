"""The one-bit weights of a model: one record and one walker, prepared or packed, whatever the scheme.

A weight may stand in several places: a block that is used K times, one parameter in two modules. It is one weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from pibinn_plugin.errors import ScaleError
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale, SignQuantizer
from pibinn_plugin.sharding import part_of, whole
from pibinn_plugin.structure import Structure
from pibinn_plugin.unpack_signs import UnpackSigns, packed_parameters

PACKED = "packed"  # in the place of a scheme's name, for a weight in the packed form


@dataclass(frozen=True)
class Place:
    """A name under which a module holds a parameter."""

    module_name: str
    module: nn.Module
    parameter_name: str

    @property
    def name(self) -> str:
        """The name in ``model.named_parameters()`` of the float model; `torch.compile` leaves no trace in it."""
        return plain_name(f"{self.module_name}.{self.parameter_name}" if self.module_name else self.parameter_name)


def distinct(places: Iterable[Place]) -> list[Place]:
    """One place for each module and parameter: a module under several names is changed once."""
    return list({(id(place.module), place.parameter_name): place for place in reversed(list(places))}.values())[::-1]


class Rule(Protocol):
    """How a weight is read from its tensor: a `SignQuantizer`, an `UnpackSigns`, or what a packed tensor knows."""

    structure: Structure
    shape: tuple[int, ...]
    compact: bool

    @property
    def scale(self) -> Any:
        """λ: the network's `GlobalScale`, or a tensor of shape ``(1,)`` in a packed tensor of a framework."""


@dataclass(frozen=True, eq=False)
class OneBitWeight:
    """One weight ``λ · S ⊙ M`` of a model.

    Args:
        places: every module and name that hold it, the first in the order of ``named_modules`` first.
        tensor: its latent V, a parameter; or its packed signs, uint8, once it is packed.
        rules: how W is read from the tensor, for each module that does; they say the same.
        scheme: which scheme holds it; `PACKED` for the packed form.
    """

    places: tuple[Place, ...]
    tensor: Tensor
    rules: tuple[Rule, ...]
    scheme: str

    @property
    def rule(self) -> Rule:
        """How W is read from the tensor."""
        return self.rules[0]

    @property
    def name(self) -> str:
        """The name that the parameter had before ``prepare``, the first where it had several."""
        return self.places[0].name

    @property
    def module(self) -> nn.Module:
        """The module that holds it, the first where there are several."""
        return self.places[0].module

    @property
    def structure(self) -> Structure:
        """Where it may be nonzero."""
        return self.rule.structure

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dense shape."""
        return self.rule.shape

    @property
    def compact(self) -> bool:
        """Whether the module holds its structural nonzeros only."""
        return self.rule.compact

    @property
    def is_packed(self) -> bool:
        """Whether its bits are stored, and no latent is."""
        return self.tensor.dtype == torch.uint8

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight as it is read."""
        return cast(UnpackSigns, self.rule).dtype if self.is_packed else self.tensor.dtype

    @property
    def latent(self) -> nn.Parameter:
        """V."""
        assert not self.is_packed
        return cast(nn.Parameter, self.tensor)

    @property
    def quantizer(self) -> SignQuantizer:
        """What stands in front of V."""
        assert not self.is_packed
        return cast(SignQuantizer, self.rule)

    def enable(self, enabled: bool) -> None:
        """Read W from the latent, or, while not enabled, ``V ⊙ M``."""
        for rule in self.rules:
            cast(SignQuantizer, rule).enabled = enabled

    @property
    def is_frozen(self) -> bool:
        """Whether its signs are kept apart from the latent, which no longer decides."""
        return not self.is_packed and self.quantizer.signs is not None

    def freeze(self, signs: PackedSigns | None = None) -> None:
        """Keep these signs from now on, or those that it has, whatever is written to the latent.

        Raises:
            StructureError: the latent is not finite.
        """
        signs = signs or self.packed
        for rule in self.rules:
            cast(SignQuantizer, rule).freeze(signs)

    def thaw(self) -> None:
        """Read the signs of the latent again."""
        for rule in self.rules:
            cast(SignQuantizer, rule).thaw()

    @torch.no_grad()
    def restore(self) -> None:
        """Set the latent to ±1 where something has moved it across zero since its signs were frozen."""
        assert self.quantizer.signs is not None
        signs = part_of(self.quantizer.signs, self.latent)
        has_its_sign = (signs == 0) | ((self.latent >= 0) == (signs > 0))
        self.latent.copy_(torch.where(has_its_sign, self.latent, signs.to(self.latent.dtype)))

    @property
    def packed(self) -> PackedSigns:
        """Its packed signs, made now where it is not packed. Raises `StructureError` where a latent is not finite."""
        if self.is_packed:
            return PackedSigns(self.tensor, self.structure, self.shape)
        return self.quantizer.packed(self.tensor if self.is_frozen else whole(self.tensor))


# A scheme's name, and what finds the parameters of a module that it holds: their names, tensors and rules.
Finder = Callable[[nn.Module], Iterator[tuple[str, Tensor, Any]]]
_FINDERS: dict[str, Finder] = {PACKED: packed_parameters}


def add_finder(scheme: str, find: Finder) -> None:
    """Let the walker find the weights of one more scheme."""
    _FINDERS[scheme] = find


def one_bit_weights(model: nn.Module) -> list[OneBitWeight]:
    """Every one-bit weight of a model once, in the order of ``named_modules``."""
    found: dict[int, tuple[list[Place], Tensor, dict[int, Rule], str]] = {}
    for module_name, module in uncompiled(model).named_modules(remove_duplicate=False):
        for scheme, find in _FINDERS.items():
            for parameter_name, tensor, rule in find(module):
                places, _, rules, _ = found.setdefault(id(tensor), ([], tensor, {}, scheme))
                places.append(Place(module_name, module, parameter_name))
                rules[id(rule)] = rule
    return [
        OneBitWeight(tuple(places), tensor, tuple(rules.values()), scheme)
        for places, tensor, rules, scheme in found.values()
    ]


def quantized_weights(model: nn.Module) -> list[OneBitWeight]:
    """Those that still have latents: the weights of a prepared model."""
    return [weight for weight in one_bit_weights(model) if not weight.is_packed]


def packed_weights(model: nn.Module) -> list[OneBitWeight]:
    """Those that are packed."""
    return [weight for weight in one_bit_weights(model) if weight.is_packed]


def global_scale(model: nn.Module) -> GlobalScale:
    """The one λ of a prepared or packed model.

    Raises:
        ScaleError: there is none, there are several, or a layer uses one that the model does not own.

    Example:
        >>> from pibinn_plugin import prepare
        >>> model = prepare(nn.Linear(3, 2), {"weight": None})
        >>> global_scale(model) is model.pibinn_scale
        True
    """
    owned = {id(module): (name, module) for name, module in model.named_modules() if isinstance(module, GlobalScale)}
    if len(owned) != 1:
        names = ", ".join(name for name, _ in owned.values())
        found = f"{len(owned)} global scales ({names})" if owned else "no global scale"
        raise ScaleError(f"the model has {found}; expected one: prepare the model as a whole, with one call")
    for weight in one_bit_weights(model):
        if isinstance(weight.rule.scale, GlobalScale) and id(weight.rule.scale) not in owned:
            raise ScaleError(f"{weight.name!r} uses a global scale that the model does not own")
    return next(module for _, module in owned.values())


def scale_values(weights: list[OneBitWeight]) -> list[float]:
    """The distinct values of λ that weights have: one in a network of this method."""
    scales = {id(weight.rule.scale): weight.rule.scale for weight in weights}.values()
    return sorted({float((scale() if isinstance(scale, GlobalScale) else scale).item()) for scale in scales})


def the_scale_value(weights: list[OneBitWeight]) -> float:
    """λ of these weights. Raises `ScaleError` where they have several."""
    values = scale_values(weights)
    if len(values) != 1:
        shown = ", ".join(f"{value:.6g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
        raise ScaleError(
            f"the one-bit weights have {len(values)} global scales ({shown}); a network has one: prepare the model as "
            f"a whole, or give each of its parts the same scale"
        )
    return values[0]


def register_scale(root: nn.Module, first_module: nn.Module, scale: GlobalScale) -> None:
    """Give λ its one name and its one state-dict key: as a child of the root, ``pibinn_scale``.

    A container gives a meaning to each of its children (``nn.Sequential`` calls them); under such a root, λ is a child
    of the first module with a target.
    """
    is_container = isinstance(root, nn.Sequential | nn.ModuleList | nn.ModuleDict) or _reads_children(type(root))
    scale.register_in(first_module if is_container else root)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, or the module itself."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # not imported for this: it takes longer than all of torch
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def plain_name(name: str) -> str:
    """A name or state-dict key without the parts that ``torch.compile`` adds.

    Example:
        >>> plain_name("solver._orig_mod.layers.0.weight")
        'solver.layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _reads_children(root_type: type) -> bool:
    code = getattr(getattr(root_type, "forward", None), "__code__", None)
    return code is not None and not {"children", "named_children", "_modules"}.isdisjoint(code.co_names)
