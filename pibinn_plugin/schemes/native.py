"""The scheme as a torch parametrization: any parameter of any module can be a target, and no framework is needed.

The latent of ``<module>.<name>`` becomes ``<module>.parametrizations.<name>.original``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from pibinn_plugin.errors import TargetError
from pibinn_plugin.parametrized import parametrize_by
from pibinn_plugin.quantizer import GlobalScale, SignQuantizer
from pibinn_plugin.schemes.base import Scheme
from pibinn_plugin.targets import Target
from pibinn_plugin.weights import Place


class Native(Scheme):
    """Torch parametrizations."""

    name = "native"

    @override
    def check(self, target: Target, place: Place) -> None:
        if parametrize.is_parametrized(place.module, place.parameter_name):
            raise TargetError(f"{target} is parametrized already; remove that parametrization first")

    @override
    def attach(self, target: Target, place: Place, scale: GlobalScale) -> None:
        device = getattr(place.module, place.parameter_name).device
        quantizer = SignQuantizer(scale, target.structure, target.shape, target.compact, device)
        parametrize_by(place.module, place.parameter_name, quantizer)

    @override
    def find(self, module: nn.Module) -> Iterator[tuple[str, Tensor, SignQuantizer]]:
        for name, chain in getattr(module, "parametrizations", {}).items():
            if isinstance(chain[0], SignQuantizer):
                yield name, chain.original, chain[0]

    @override
    def release(self, place: Place) -> None:
        """Nothing: `read_from_bits` replaces the first parametrization, and what follows it stays."""
