"""Parametrized modules whose class is exchanged, never edited, and which can be pickled.

torch injects a class with a property for each parametrized parameter. A deepcopy shares that class, so that removing a
parametrization from the copy the way torch does takes the property from the original too; and the class refuses to be
pickled, by which spawned processes and ``torch.save(model)`` fail.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pibinn_plugin.quantizer import OneBitRule

_INJECTED = ("__dict__", "__weakref__", "__getstate__")


def parametrize_by(module: nn.Module, name: str, parametrization: OneBitRule, unsafe: bool = False) -> None:
    """Register a parametrization, in place; afterwards the module can be pickled.

    Args:
        module: the module.
        name: of its parameter or buffer.
        parametrization: gives what is read.
        unsafe: whether it changes dtype or shape.
    """
    parametrize.register_parametrization(module, name, parametrization, unsafe=unsafe)
    parametrization.is_attached = True
    set_class_before(module, parametrize.type_before_parametrizations(module))


def set_class_before(module: nn.Module, before: type[nn.Module], without: str | None = None) -> None:
    """Give a parametrized module another class below the one that was injected, in place; ``without`` a property."""
    members = {key: value for key, value in vars(type(module)).items() if key not in (*_INJECTED, without)}
    for key, value in members.items():
        if type(value) is property:
            members[key] = _PackedWeight(key, value)
    members |= {"__reduce_ex__": _reduce, "register_parameter": _register_parameter}
    module.__class__ = type(f"Parametrized{before.__name__}", (before,), members)


def stop_parametrizing(module: nn.Module, name: str) -> None:
    """Take all parametrizations of a parameter away, in place, and leave no parameter of that name."""
    chains: Any = module.parametrizations
    before = parametrize.type_before_parametrizations(module)
    del chains[name]
    if len(chains):
        set_class_before(module, before, without=name)
    else:
        del module.parametrizations
        module.__class__ = before


class _PackedWeight(property):
    """The property that torch injected, which calls the parametrizations one by one: packed bits are read without that.

    Written with dictionaries, since nn.Module looks attributes up in Python, and a parameter is read in a microsecond.
    """

    def __init__(self, name: str, injected: property) -> None:
        call: Any = injected.fget

        def read(module: nn.Module) -> Tensor:
            chain: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
            rule, bits = chain._modules["0"], chain._buffers.get("original")
            is_packed = bits is not None and isinstance(rule, OneBitRule) and len(chain._modules) == 1
            return rule.forward(bits) if is_packed and not parametrize._cache_enabled else call(module)

        super().__init__(read, injected.fset)


def _register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """An assignment ends here: torch would raise a ``KeyError``, the parametrization says what it thinks of it."""
    chains: Any = module.parametrizations
    if name in chains and param is not None:
        chains[name].right_inverse(param)
    else:
        parametrize.type_before_parametrizations(module).register_parameter(module, name, param)  # type: ignore[attr-defined]


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    names = tuple(module.parametrizations)  # type: ignore[arg-type]
    return _rebuild, (parametrize.type_before_parametrizations(module), names), dict(vars(module))


def _rebuild(before: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module = before.__new__(before)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    set_class_before(module, before)
    return module
