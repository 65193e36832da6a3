"""`Scheme`: what a framework's scheme must give, and the schemes that are in use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.targets import Target
from pibinn_plugin.weights import Place, add_finder

LOADED: dict[str, Scheme] = {}  # by name: those whose file was imported


class Scheme(ABC):
    """How a framework holds a one-bit weight while it is trained.

    In every scheme ``module.<name>`` reads as W, the module stays the object that it was, and its latent the parameter.
    """

    name: ClassVar[str]
    loads_consolidated_shards = True  # whether Lightning can load a consolidated checkpoint of a sharded model

    def __init_subclass__(cls) -> None:
        LOADED[cls.name] = cls()
        add_finder(cls.name, LOADED[cls.name].find)

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
