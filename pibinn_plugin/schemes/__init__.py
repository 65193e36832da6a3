"""The scheme in each framework's own words, one file a framework, which alone imports that framework.

A scheme is a `Scheme`: what it must give is written there and nowhere else. It is used by name, and its file is
imported then; the weights that it holds are found by the one walker of `pibinn_plugin.weights` from that moment on.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.targets import Target
from pibinn_plugin.weights import PACKED, Place, add_finder

# Each scheme, and the pattern of the state-dict keys under which it keeps the structures of weights: what a checkpoint
# was trained with is seen without importing its framework.
SCHEMES = {
    "native": "*parametrizations.*.0._extra_state",
    "torchao": "*weight_fake_quantizer._extra_state",
    "brevitas": "*weight_quant.tensor_quant.sign_quantizer._extra_state",
}

_LOADED: dict[str, Scheme] = {}


class Scheme(ABC):
    """How a framework holds a one-bit weight while it is trained.

    In every scheme ``module.<name>`` reads as W, the module stays the object that it was, and its latent the parameter.
    """

    name: ClassVar[str]
    loads_consolidated_shards = True  # whether Lightning can load a consolidated checkpoint of a sharded model

    def __init_subclass__(cls) -> None:
        _LOADED[cls.name] = cls()
        add_finder(cls.name, _LOADED[cls.name].find)

    @abstractmethod
    def check(self, target: Target, place: Place) -> None:
        """Raise `TargetError` where the scheme cannot hold the target in this place. Nothing is changed."""

    @abstractmethod
    def attach(self, target: Target, place: Place, scale: GlobalScale) -> None:
        """Put a quantizer in front of the parameter, in place; the parameter becomes the latent."""

    @abstractmethod
    def find(self, module: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
        """Name, latent and `SignQuantizer` of each parameter of a module that this scheme holds, submodules left out.

        Or, of one that the framework packed itself, name, bits and a `pibinn_plugin.weights.Rule`.
        """

    @abstractmethod
    def release(self, place: Place) -> None:
        """Take the quantizer away, in place, so that the packed form can take over the parameter."""

    def traceable(self, model: nn.Module, args: tuple[Tensor, ...]) -> AbstractContextManager[None]:
        """In which ``torch.export`` can trace what the framework's layers in a packed model do beside their weight."""
        return nullcontext()


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
    return _LOADED[name]


def loaded_schemes() -> list[Scheme]:
    """The schemes that are in use: no model can hold weights of another."""
    return list(_LOADED.values())


def schemes_in(keys: Iterable[str]) -> set[str]:
    """The schemes whose weights a state dict with these keys holds."""
    names = list(keys)
    return {scheme for scheme, pattern in SCHEMES.items() if any(fnmatchcase(key, pattern) for key in names)}


def release(scheme: str, place: Place) -> None:
    """Take whatever scheme holds a weight away from a place of it, in place."""
    if scheme != PACKED:
        _LOADED[scheme].release(place)
