"""A layer in which ``weight`` reads as W while its parameter of that name is the latent, in place.

Frameworks keep the latent under the state-dict key ``weight`` and quantize it in the forward of their own layers. Code
that reads the weight elsewhere (tied dictionaries, attention, fused kernels) would get the latent. Here the class of
the layer is exchanged for a subclass with a property, as torch's parametrizations do: the object stays.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.quantizer import READ_ONLY
from pibinn_plugin.sharding import is_sharded


class WeightReadsAsW(nn.Module):
    """Mixed into the class of a layer by `read_as_w`. A subclass says what is read, as ``weight_of_latent``."""

    is_loading_latent = False

    def weight_of_latent(self, latent: Tensor) -> Tensor:
        """W, differentiable by the latent."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """``λ · sign(V) ⊙ M``; the latent V is ``get_parameter``'s."""
        latent = self._parameters["weight"]
        assert latent is not None
        # FSDP2 asks for its sharded parameter by this name; in a forward it is whole.
        return latent if is_sharded(latent) else self.weight_of_latent(latent)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise PIBiNNError(READ_ONLY)

    @override
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # An assignment ends here, and so does load_state_dict(assign=True), which brings a latent.
        if name != "weight":
            super().register_parameter(name, param)
        elif self.is_loading_latent:
            self._parameters["weight"] = param  # nn.Module would read W first
        else:
            raise PIBiNNError(READ_ONLY)

    @override
    def __delattr__(self, name: str) -> None:
        if name == "weight":  # torch's parametrizations and weight norms begin so
            raise PIBiNNError(READ_ONLY)
        super().__delattr__(name)

    @override
    def get_parameter(self, target: str) -> nn.Parameter:
        return self._parameters["weight"] if target == "weight" else super().get_parameter(target)  # type: ignore[return-value]

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.is_loading_latent = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self.is_loading_latent

    @override
    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kind: Any = type(self)
        return _rebuild, (kind.class_before, kind.mixins), dict(vars(self))


def read_as_w(module: nn.Module, *mixins: type[nn.Module]) -> None:
    """Give a module the class of these mixins, one of which is a `WeightReadsAsW`, over its own, in place."""
    own: Any = type(module)
    module.__class__ = _subclass(own, mixins)


def stop_reading_as_w(module: nn.Module) -> None:
    """Undo `read_as_w`: the module has its own class again, and its latent is its weight."""
    module.__class__ = type(module).class_before  # type: ignore[attr-defined]


@cache
def _subclass(own: Any, mixins: Any) -> Any:
    return type(f"PIBiNN{own.__name__}", (*mixins, own), {"class_before": own, "mixins": mixins})


def _rebuild(own: type[nn.Module], mixins: tuple[type, ...]) -> nn.Module:
    kind = _subclass(cast(Any, own), mixins)
    return kind.__new__(kind)
