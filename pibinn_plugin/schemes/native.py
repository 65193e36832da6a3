"""The scheme as a torch parametrization: any parameter of any module can be a target, and no framework is needed.

The latent of ``<module>.<name>`` becomes ``<module>.parametrizations.<name>.original``.
"""

from torch import nn
from torch.nn.utils import parametrize

from pibinn_plugin.errors import TargetError
from pibinn_plugin.quantizer import GlobalScale, SignQuantizer
from pibinn_plugin.targets import Target, check_own_forward


def check(root: nn.Module, target: Target) -> None:
    """Raise `TargetError` where a parametrization would not reach the forward, or where there is one already."""
    check_own_forward(target)
    if isinstance(target.module, nn.RNNBase):
        # The forward of recurrent layers reads _flat_weights, a list made once: it would go on with the latents.
        raise TargetError(f"{target}: recurrent layers bypass parametrizations; use linear layers in a loop")
    if parametrize.is_parametrized(target.module, target.parameter_name):
        raise TargetError(f"{target} is parametrized already; remove that parametrization first")


def attach(root: nn.Module, target: Target, scale: GlobalScale) -> None:
    """Parametrize the target, in place."""
    device = getattr(target.module, target.parameter_name).device
    quantizer = SignQuantizer(scale, target.structure, target.shape, target.compact, device)
    parametrize.register_parametrization(target.module, target.parameter_name, quantizer)
