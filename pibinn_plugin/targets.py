"""From parameter-name patterns to targets: which weights are quantized, with which structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from pibinn_plugin.errors import StructureError, TargetError
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.structure import Dense, Structure

Targets = Mapping[str, Structure | None]


@dataclass(frozen=True)
class Target:
    """One weight to quantize: where it stands, and its structure."""

    module_name: str
    module: nn.Module
    parameter_name: str
    structure: Structure
    shape: tuple[int, ...]
    compact: bool

    @property
    def name(self) -> str:
        """The name in ``model.named_parameters()``."""
        return f"{self.module_name}.{self.parameter_name}" if self.module_name else self.parameter_name

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, before a scheme touches it."""
        return getattr(self.module, self.parameter_name)

    @property
    def structural_latent(self) -> Tensor:
        """The structural nonzeros of the parameter."""
        return self.parameter if self.compact else self.structure.to_compact(self.parameter.detach())

    def __str__(self) -> str:
        return f"{self.name!r} (shape {self.shape}, in a {type(self.module).__name__})"


def resolve_targets(model: nn.Module, targets: Targets) -> list[Target]:
    """Find the parameters that the patterns name.

    Args:
        model: any module.
        targets: shell-style pattern of parameter names (``*`` also matches dots) to the structure of the weight; None
            means the structure that the layer already has (compact layers), or `Dense`.

    Raises:
        TargetError: a pattern that matches nothing, a parameter matched by two patterns, shared under two names, not
            floating-point, or not yet initialised.
        StructureError: a structure that does not fit a shape, or another one than a compact layer has.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [target.name for target in resolve_targets(model, {"*.weight": None})]
        ['0.weight', '2.weight']
    """
    if not targets:
        raise TargetError("no targets: give at least one parameter-name pattern, such as {'*.weight': None}")
    names_by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_parameter.setdefault(id(parameter), []).append(name)
    resolved: dict[str, Target] = {}
    for pattern, structure in targets.items():
        matches = [name for names in names_by_parameter.values() for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise TargetError(f"the pattern {pattern!r} matches no parameter; {_describe_parameters(model)}")
        for name in matches:
            if name in resolved:
                raise TargetError(f"{name!r} is matched by {pattern!r} and by another pattern; each weight needs one")
            resolved[name] = _target(model, name, structure)
            if len(names := names_by_parameter[id(model.get_parameter(name))]) > 1:
                raise TargetError(
                    f"{resolved[name]} is shared under the names {names}: register the module once and call it several "
                    f"times, or give each name a parameter of its own"
                )
    return list(resolved.values())


def check_own_forward(target: Target) -> None:
    """Raise `TargetError` where the instance has a forward of its own: a copy of it would go on with the original."""
    if "forward" in vars(target.module):
        raise TargetError(f"{target} has a forward patched into the instance; put it in a class, or patch it later")


def check_readers(root: nn.Module, target: Target) -> None:
    """Raise `TargetError` where another module reads the weight past the forward of the module that holds it."""
    for name, module in root.named_modules():
        # In evaluation it hands the weights of its layers to a fused kernel.
        if isinstance(module, nn.TransformerEncoderLayer) and target.module in module.children():
            raise TargetError(f'{target} is read by the TransformerEncoderLayer {name!r} itself; use scheme="native"')


def _target(model: nn.Module, name: str, structure: Structure | None) -> Target:
    module_name, _, parameter_name = name.rpartition(".")
    module, parameter = model.get_submodule(module_name), model.get_parameter(name)
    if is_lazy(parameter) or isinstance(parameter, UninitializedParameter):
        raise TargetError(f"{name!r} has no shape yet: run one batch through the model before it is prepared")
    if not parameter.is_floating_point() or hasattr(parameter, "packed_signs"):
        raise TargetError(f"{name!r} is {parameter.dtype} or packed already; expected a floating-point latent")
    if structure is not None and not isinstance(structure, Structure):
        raise TargetError(f"the structure of {name!r} is {structure!r}; expected a Structure, or None")
    if not isinstance(module, CompactLinear) or parameter_name != "weight":
        target = Target(module_name, module, parameter_name, structure or Dense(), tuple(parameter.shape), False)
    elif structure is not None and structure != module.structure:
        raise StructureError(f"{name!r} is stored as {module.structure}; it cannot be given {structure}")
    else:
        target = Target(module_name, module, parameter_name, module.structure, module.dense_shape, True)
    try:
        target.structure.check(target.shape)
    except StructureError as error:
        raise StructureError(f"target {target}: {error}") from None
    return target


def _describe_parameters(model: nn.Module) -> str:
    names = list(_weight_names(model))
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"the model's weights are: {shown}" if names else "the model has no parameter with two dimensions or more"


def _weight_names(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.dim() >= 2:
            yield name if is_lazy(parameter) else f"{name} {tuple(parameter.shape)}"
