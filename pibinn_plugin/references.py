"""What the modules of a model hold beside their registered children: lists of layers, bound forwards, closures.

A module that is changed in place is changed for all of them. A copy is not: ``copy.deepcopy`` follows containers, bound
methods and ``functools.partial``, but takes a function as it is, with the original model in its closure.
"""

from __future__ import annotations

import copy
import dis
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.weights import uncompiled

# Registered children, and what `nn.Module.compile` adds, which torch leaves out of copies.
_NOT_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl"})


@dataclass(frozen=True, eq=False)
class Holder:
    """A module or tensor that something beside its registration holds."""

    where: str
    held: nn.Module | Tensor
    by_function: bool  # through the closure, defaults or globals of a function, which a copy does not follow


def held_beside_children(model: nn.Module) -> Iterator[Holder]:
    """Every module and tensor that the modules of a model hold in attributes, containers, hooks and functions."""
    root = uncompiled(model)
    for name, module in root.named_modules():
        if uncompiled(module) is not module:
            continue  # what torch.compile keeps is its own business, also in a copy
        seen: set[int] = set()
        for attribute, value in vars(module).items():
            if attribute not in _NOT_ATTRIBUTES:
                yield from _held(value, f"{name or type(root).__name__}.{attribute}", False, seen)
        forward = vars(type(module)).get("forward")
        if isinstance(forward, types.FunctionType):
            yield from _held(forward, f"{type(module).__name__}.forward", False, seen)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy in which nothing goes on with the original.

    Tensors that carry a graph, such as an output that a module keeps, are copied without it.

    Raises:
        PIBiNNError: a function holds a part of the model, which the copy would go on with; or an attribute that cannot
            be copied.
    """
    root = uncompiled(model)
    own: dict[int, str] = {id(module): name or "the model" for name, module in root.named_modules()}
    own |= {id(tensor): name for name, tensor in (*root.named_parameters(), *root.named_buffers())}
    memo: dict[int, Any] = {}
    for holder in held_beside_children(root):
        if holder.by_function and id(holder.held) in own:
            raise PIBiNNError(
                f"{holder.where} is a function that holds {own[id(holder.held)]!r} of this model, and a copy would go "
                f"on with the original: make it a method, or bind it with functools.partial"
            )
        if isinstance(holder.held, Tensor) and holder.held.grad_fn is not None:
            memo[id(holder.held)] = holder.held.detach().clone()
    try:
        return copy.deepcopy(root, memo)
    except Exception as error:  # whatever an attribute of the user's raises
        raise PIBiNNError(f"the model cannot be copied{_culprit(root, memo)}: {error}") from error


def refuse_stale_methods(model: nn.Module) -> None:
    """Raise `PIBiNNError` where something holds a method of a class that its module no longer has."""
    for name, module in uncompiled(model).named_modules():
        for attribute, value in vars(module).items():
            for method in _methods(value, set()):
                owner = type(method.__self__)
                if isinstance(method.__self__, nn.Module) and not any(
                    method.__func__ in vars(each).values() for each in owner.__mro__
                ):
                    raise PIBiNNError(
                        f"{name or 'the model'}.{attribute} holds {method.__func__.__qualname__} of a layer that is "
                        f"packed now: take the method before prepare, or call the layer"
                    )


def _methods(value: Any, seen: set[int]) -> Iterator[types.MethodType]:
    if isinstance(value, types.MethodType):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module | Tensor | types.FunctionType):
        seen.add(id(value))
        for part, _, _ in _parts(value):
            yield from _methods(part, seen)


def _held(value: Any, where: str, by_function: bool, seen: set[int]) -> Iterator[Holder]:
    if isinstance(value, nn.Module | Tensor):
        yield Holder(where, value, by_function)
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for part, name, is_of_function in _parts(value):
        yield from _held(part, where + name, by_function or is_of_function, seen)


def _parts(value: Any) -> Iterator[tuple[Any, str, bool]]:
    """What a container, bound method, partial or function holds."""
    if isinstance(value, Mapping):
        yield from ((part, f"[{key!r}]", False) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((part, f"[{index}]", False) for index, part in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((part, "", False) for part in (value.func, value.args, value.keywords))
    elif isinstance(value, types.MethodType):
        yield from ((part, "", False) for part in (value.__self__, value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from ((part, "", True) for part in _held_by_function(value))


def _held_by_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield from (function.__defaults__ or (), function.__kwdefaults__ or {})
    for name in _global_names(function.__code__):
        if isinstance(value := function.__globals__.get(name), nn.Module | Tensor | types.MethodType):
            yield value


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = {instruction.argval for instruction in dis.get_instructions(code) if instruction.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_global_names(constant))
    return tuple(sorted(names))


def _culprit(root: nn.Module, memo: dict[int, Any]) -> str:
    """Which attribute it is that cannot be copied, as a part of a sentence."""
    for name, module in root.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _NOT_ATTRIBUTES:
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:  # it is the one
                    return f", because of {name or type(root).__name__}.{attribute}"
    return ""
