"""The packed model as Brevitas layers: what qonnx and qcdq are written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from brevitas import config
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import Tensor, nn

from pibinn_plugin.errors import ExportError, TargetError
from pibinn_plugin.export.float_layers import has_empty_blocks, with_float_weights
from pibinn_plugin.packing import packed_signs_of
from pibinn_plugin.schemes import brevitas, brevitas_export
from pibinn_plugin.targets import Target
from pibinn_plugin.workflow import global_scale


def with_brevitas_layers(packed: nn.Module) -> nn.Module:
    """Turn every packed weight into the latent of a Brevitas layer of the same λ, structure and signs, in place.

    Returns:
        The model, inside an ``nn.Sequential``: Brevitas cannot swap a root module.

    Raises:
        ExportError: a weight is no weight of a layer that Brevitas has.
    """
    if not any(True for _ in packed_signs_of(packed)):
        return packed  # the float twin of a network, exported to compare sizes
    scale = global_scale(packed)
    twin, weights = with_float_weights(packed)
    root = nn.Sequential(twin)
    for weight in weights:
        module_name = f"0.{weight.module_name}" if weight.module_name else "0"
        module: Any = root.get_submodule(module_name)
        if weight.in_place and weight.compact and has_empty_blocks(weight.packed):
            raise ExportError(f"{weight.name!r} has empty blocks, which Brevitas' exporters cannot write")
        if isinstance(module, QuantWeightBiasInputOutputLayer):
            continue  # it was trained as a Brevitas layer, and has its weight quantizer
        target = Target(
            module_name, module, weight.parameter_name, weight.packed.structure, weight.packed.shape, weight.compact
        )
        try:
            brevitas.check(root, target)
        except TargetError as error:
            raise ExportError(
                f"{weight.name!r} cannot be written through Brevitas, which has linear, convolution, compact layers; "
                f"export as onnx, pt2 or aoti ({error})"
            ) from error
        brevitas.attach(root, target, scale)
    return root.eval()


def export_through_brevitas(
    exporter: Callable[..., Any], manager: Any, packed: nn.Module, args: tuple[Tensor, ...], path: Path
) -> None:
    """Write a packed model, which is used up, with one of Brevitas' exporters; Brevitas is left as it was found."""
    brevitas_export.register()
    model = with_brevitas_layers(packed)
    try:
        # Not dynamo: through it Brevitas writes no quantized biases.
        exporter(
            model,
            args=args,
            export_path=str(path),
            dynamo=False,
            opset_version=18,
            keep_initializers_as_inputs=False,
        )
    finally:
        # A failed export leaves both, and the next one would stop at an assertion or reuse what was traced.
        manager._fn_cache.clear()
        config._ONGOING_EXPORT = None
