"""From parameter-name patterns to targets: which weights are quantized, with which structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from pibinn_plugin.errors import StructureError, TargetError
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.references import held_beside_children
from pibinn_plugin.structure import Dense, Structure
from pibinn_plugin.weights import Place, uncompiled

Targets = Mapping[str, Structure | None]


@dataclass(frozen=True)
class Target:
    """One weight to quantize: everywhere it stands, and its structure."""

    places: tuple[Place, ...]
    structure: Structure
    shape: tuple[int, ...]
    compact: bool

    @property
    def name(self) -> str:
        """The name in ``model.named_parameters()``, the first where the weight has several."""
        return self.places[0].name

    @property
    def module(self) -> nn.Module:
        """The module that holds it, the first where there are several."""
        return self.places[0].module

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, before a scheme touches it."""
        return getattr(self.module, self.places[0].parameter_name)

    @property
    def structural_latent(self) -> Tensor:
        """The structural nonzeros of the parameter."""
        return self.parameter if self.compact else self.structure.to_compact(self.parameter.detach())

    def __str__(self) -> str:
        return f"{self.name!r} (shape {self.shape}, in a {type(self.module).__name__})"


def resolve_targets(model: nn.Module, targets: Targets) -> list[Target]:
    """Find the parameters that the patterns name.

    A parameter under several names (a block that is used several times, tied modules) is one target, found by any of
    them.

    Args:
        model: any module.
        targets: shell-style pattern of parameter names (``*`` also matches dots), or a name as it is, to the structure
            of the weight; None means the structure that the layer already has (compact layers), or `Dense`.

    Raises:
        TargetError: a pattern that matches nothing, a parameter matched by two patterns, not floating-point, not yet
            initialised, without a dimension, held in a plain list past its module, or, by a pattern and not by its
            name, a vector (such as the gain of a normalization) or an embedding with a padding row.
        StructureError: a structure that does not fit a shape, or another one than a compact layer has.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [target.name for target in resolve_targets(model, {"*.weight": None})]
        ['0.weight', '2.weight']
    """
    if targets and not isinstance(targets, Mapping):
        raise TargetError(
            f"targets are a {type(targets).__name__}; expected a dict from parameter-name pattern to structure"
        )
    if not targets:
        raise TargetError("no targets: give at least one parameter-name pattern, such as {'*.weight': None}")
    places = parameter_places(model)
    matched: dict[int, str] = {}
    resolved, vectors = [], []
    for pattern, structure in targets.items():
        if not isinstance(pattern, str):
            raise TargetError(f"{pattern!r} is no parameter-name pattern; expected text, such as '*.weight'")
        found = [key for key, held in places.items() if any(_matches(place.name, pattern) for place in held)]
        if not found:
            raise TargetError(f"the pattern {pattern!r} matches no parameter; {_describe_parameters(places)}")
        for key in found:
            target = make_target(places[key], structure)
            if key in matched:
                raise TargetError(
                    f"{target.name!r} is matched by {matched[key]!r} and by another pattern, {pattern!r}; each weight "
                    f"needs one"
                )
            matched[key] = pattern
            is_named = any(place.name == pattern for place in target.places)
            if not is_named and isinstance(target.structure, Dense) and _is_no_matrix(target):
                vectors.append(target)
            resolved.append(target)
    if vectors:
        names = ", ".join(map(str, vectors[:4])) + (f" and {len(vectors) - 4} more" if len(vectors) > 4 else "")
        raise TargetError(
            f"a pattern takes in {names}: gains of normalizations and other vectors, and embeddings with a padding "
            f"row, are quantized only where they are named one by one; narrow the pattern"
        )
    _refuse_held_elsewhere(model, resolved)
    return resolved


def parameter_places(model: nn.Module) -> dict[int, list[Place]]:
    """Every parameter of a model, by identity: the places that hold it, in the order of ``named_modules``."""
    places: dict[int, list[Place]] = {}
    for module_name, module in uncompiled(model).named_modules(remove_duplicate=False):
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(Place(module_name, module, parameter_name))
    return places


def make_target(places: list[Place], structure: Structure | None) -> Target:
    """The target in these places, checked by itself. Raises as `resolve_targets` does."""
    name, module = places[0].name, places[0].module
    parameter = module._parameters[places[0].parameter_name]
    assert parameter is not None
    if is_lazy(parameter) or isinstance(parameter, UninitializedParameter):
        raise TargetError(f"{name!r} has no shape yet: run one batch through the model before it is prepared")
    if not parameter.is_floating_point() or hasattr(parameter, "packed_signs"):
        raise TargetError(f"{name!r} is {parameter.dtype} or packed already; expected a floating-point latent")
    if parameter.dim() == 0:
        raise TargetError(f"{name!r} is a number, without a dimension; a one-bit weight is a vector or a matrix")
    if structure is not None and not isinstance(structure, Structure):
        raise TargetError(f"the structure of {name!r} is {structure!r}; expected a Structure, or None")
    for place in places:
        if isinstance(place.module, torch.jit.ScriptModule):
            raise TargetError(f"{name!r} is in a ScriptModule, whose code is fixed: prepare the model, then script it")
    compact = [_compact_layer(place) for place in places]
    if layer := compact[0]:
        if structure not in (None, layer.structure):
            raise StructureError(f"{name!r} is stored as {layer.structure}; it cannot be given {structure}")
        structure = layer.structure
    shape = tuple(parameter.shape) if layer is None else layer.dense_shape
    structure = structure or Dense()
    for place, other in zip(places, compact, strict=True):
        if (other is None) != (layer is None) or (other and (other.structure, other.dense_shape) != (structure, shape)):
            raise TargetError(f"{name!r} is also {place.name!r}, in a layer that reads it by another structure")
    target = Target(tuple(places), structure, shape, layer is not None)
    try:
        structure.check(shape)
    except StructureError as error:
        raise StructureError(f"target {target}: {error}") from None
    return target


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a name may hold brackets


def _compact_layer(place: Place) -> CompactLinear | None:
    return place.module if isinstance(place.module, CompactLinear) and place.parameter_name == "weight" else None


def _is_no_matrix(target: Target) -> bool:
    if len(target.shape) < 2:
        return True
    return any(
        isinstance(place.module, nn.Embedding) and place.module.padding_idx is not None for place in target.places
    )


def _refuse_held_elsewhere(model: nn.Module, targets: list[Target]) -> None:
    """A forward that reads a parameter from a plain list, or from a function's closure, would go on with the latent."""
    names = {id(target.parameter): target for target in targets}
    for holder in held_beside_children(model):
        of_view = getattr(holder.held, "_base", None)  # a view, such as a transposed weight that a module keeps
        if target := names.get(id(holder.held)) or names.get(id(of_view)):
            raise TargetError(
                f"{target} is also held by {holder.where}, which would go on with the latent: read it from its module "
                f"there, or keep it in an nn.ParameterList"
            )


def _describe_parameters(places: dict[int, list[Place]]) -> str:
    names = list(_weight_names(places))
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"the model's weights are: {shown}" if names else "the model has no parameter with two dimensions or more"


def _weight_names(places: dict[int, list[Place]]) -> Iterator[str]:
    for first, *_ in places.values():
        parameter = first.module._parameters[first.parameter_name]
        assert parameter is not None
        if is_lazy(parameter) or parameter.dim() >= 2:
            yield first.name if is_lazy(parameter) else f"{first.name} {tuple(parameter.shape)}"
