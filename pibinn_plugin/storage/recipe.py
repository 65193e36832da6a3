"""How a solver is built again: its class and the arguments that it was made with, as JSON, never as code.

A class that is decorated with `records_arguments` notes the arguments of each instance. `recipe_of` gives them for a
solver with all that was made in the same way inside them (operators, structures), `build` makes the solver anew.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from pibinn_plugin.errors import ArtifactError
from pibinn_plugin.structure import Structure
from pibinn_plugin.structure.base import short

Recipe = dict[str, Any]
_Class = TypeVar("_Class", bound=type)

_OURS = ("lightning_modules", "pibinn_plugin")
_RECIPE = "_pibinn_recipe"  # in an instance: its recipe, or None where an argument has no JSON form
_RECORDS = "_pibinn_records_arguments"  # on an initializer that notes its arguments
_DEEPEST = 16  # objects within objects


class _NoJSONFormError(Exception):
    """A value that is neither JSON nor an object with a recipe."""


def records_arguments(cls: _Class) -> _Class:
    """Class decorator: each instance notes its arguments, so that a packed file can say how it is built.

    Arguments that are numbers, text, lists or dictionaries of those, structures, or objects of such classes have a
    JSON form. An instance with any other argument, such as a tensor, works as ever and has no recipe.

    Example:
        >>> @records_arguments
        ... class Twice(nn.Module):
        ...     def __init__(self, size, layers=2):
        ...         super().__init__()
        >>> recipe_of(Twice(3))["init_args"]
        {'size': 3, 'layers': 2}
    """
    initialize: Callable[..., None] = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        # Of the classes of an instance, the outermost is the one to call.
        if type(self).__init__ is recording:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            vars(self)[_RECIPE] = _recipe(type(self), signature, list(bound.arguments.items())[1:])
        initialize(self, *args, **kwargs)

    setattr(recording, _RECORDS, True)
    cls.__init__ = recording  # type: ignore[misc]
    return cls


def recipe_of(solver: object) -> Recipe | None:
    """The class path and the arguments of an object; None where they are not known or have no JSON form."""
    return vars(solver).get(_RECIPE)


def build(recipe: object, allow: Collection[str] = ()) -> Any:
    """Make the object of a recipe, which is not trusted.

    Args:
        recipe: ``class_path`` and ``init_args``.
        allow: modules, with all that is in them, whose classes may be used besides those of this project.

    Raises:
        ArtifactError: another module's class, a class that `records_arguments` does not decorate, or arguments that
            the class refuses. Nothing of a module that is not allowed is imported.

    Example:
        >>> build({"class_path": "os.system", "init_args": {"command": "true"}})
        Traceback (most recent call last):
        pibinn_plugin.errors.ArtifactError: the recipe asks for 'os.system', of a module that is not allowed: ...
    """
    return _built(recipe, allow, 0)


def _recipe(cls: type, signature: inspect.Signature, arguments: list[tuple[str, Any]]) -> Recipe | None:
    kinds = {signature.parameters[name].kind for name, _ in arguments}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY}:
        return None
    try:
        return {"class_path": _class_path(cls), "init_args": {name: _json_form(value) for name, value in arguments}}
    except _NoJSONFormError:
        return None


def _class_path(cls: type) -> str:
    """The shortest path under which a class is known."""
    if "<locals>" in cls.__qualname__:
        raise _NoJSONFormError
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        package = sys.modules.get(".".join(parts[:length]))
        if package is not None and vars(package).get(cls.__qualname__) is cls:
            return ".".join((*parts[:length], cls.__qualname__))
    return f"{cls.__module__}.{cls.__qualname__}"


def _json_form(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_json_form(item) for item in value]
    if isinstance(value, Structure):
        return {"structure": json.loads(value.to_json())}
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _json_form(item) for key, item in value.items()}
    if (recipe := getattr(value, "__dict__", {}).get(_RECIPE)) is not None:
        return recipe
    raise _NoJSONFormError


def _built(recipe: object, allow: Collection[str], depth: int) -> Any:
    if not (isinstance(recipe, dict) and recipe.keys() == {"class_path", "init_args"} and depth < _DEEPEST):
        raise ArtifactError(f"{short(recipe)} is no recipe; expected class_path and init_args, at most {_DEEPEST} deep")
    path, arguments = recipe["class_path"], recipe["init_args"]
    if not isinstance(path, str) or not isinstance(arguments, dict):
        raise ArtifactError(f"{short(recipe)} is no recipe: class_path is text and init_args a JSON object")
    cls = _class_at(path, allow)
    values = {name: _value(value, allow, depth) for name, value in arguments.items()}
    try:
        return cls(**values)
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError, ZeroDivisionError) as error:
        raise ArtifactError(f"{path} cannot be built with {short(arguments)}: {error}") from error


def _class_at(path: str, allow: Collection[str]) -> Any:
    module_name, _, name = path.rpartition(".")
    if any(not part or part.startswith("_") for part in path.split(".")):  # to import a __main__ is to run it
        raise ArtifactError(f"the recipe asks for {short(path)}, which is no public class")
    if not any(module_name == allowed or module_name.startswith(f"{allowed}.") for allowed in (*_OURS, *allow)):
        raise ArtifactError(
            f"the recipe asks for {short(path)}, of a module that is not allowed: give allow=[{short(module_name)}] if "
            f"you trust that module, or build the solver and load(path, into=solver)"
        )
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise ArtifactError(f"the recipe asks for {short(path)}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and hasattr(found.__init__, _RECORDS)):  # type: ignore[misc]
        raise ArtifactError(f"the recipe asks for {short(path)}, which is no class that records its arguments")
    return found


def _value(value: Any, allow: Collection[str], depth: int) -> Any:
    """An argument from its JSON form; lists become tuples, of which dataclasses and defaults are made."""
    if isinstance(value, list):
        return tuple(_value(item, allow, depth) for item in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"structure"}:
        return Structure.from_json(json.dumps(value["structure"]))
    if "class_path" in value:
        return _built(value, allow, depth + 1)
    return {key: _value(item, allow, depth) for key, item in value.items()}
