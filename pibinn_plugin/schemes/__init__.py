"""The scheme in each framework's own words, one file a framework, which alone imports that framework.

A scheme is a `Scheme`: what it must give is written there and nowhere else. It is used by name, and its file is
imported then; the weights that it holds are found by the one walker of `pibinn_plugin.weights` from that moment on.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.schemes import (
    native as native,
)  # needs torch only; and a model unpickled in a new process names none
from pibinn_plugin.schemes.base import LOADED, Scheme
from pibinn_plugin.weights import PACKED, Place

# Each scheme, and the pattern of the state-dict keys under which it keeps the structures of weights: what a checkpoint
# was trained with is seen without importing its framework.
SCHEMES = {
    "native": "*parametrizations.*.0._extra_state",
    "torchao": "*weight_fake_quantizer._extra_state",
    "brevitas": "*weight_quant.tensor_quant.sign_quantizer._extra_state",
}


def scheme_of(name: str) -> Scheme:
    """The scheme of this name, its framework imported.

    Raises:
        PIBiNNError: there is none.
        ModuleNotFoundError: its framework is not installed.
    """
    if name not in SCHEMES:
        raise PIBiNNError(f"unknown scheme {name!r}; expected one of {', '.join(SCHEMES)}")
    try:
        importlib.import_module(f"pibinn_plugin.schemes.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"scheme {name!r} needs {error.name}: pip install pibinn-plugin[{name}]") from error
    return LOADED[name]


def loaded_schemes() -> list[Scheme]:
    """The schemes that are in use: no model can hold weights of another."""
    return list(LOADED.values())


def schemes_in(keys: Iterable[str]) -> set[str]:
    """The schemes whose weights a state dict with these keys holds."""
    names = list(keys)
    return {scheme for scheme, pattern in SCHEMES.items() if any(fnmatchcase(key, pattern) for key in names)}


def release(scheme: str, place: Place) -> None:
    """Take whatever scheme holds a weight away from a place of it, in place."""
    if scheme != PACKED:
        LOADED[scheme].release(place)
