"""The packed model as Brevitas layers: what qonnx and qcdq are written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pibinn_plugin.errors import ExportError, TargetError
from pibinn_plugin.export.float_layers import has_empty_blocks, is_stock_compact, to_dense_layer, with_float_weights
from pibinn_plugin.schemes import scheme_of
from pibinn_plugin.structure import Banded, BlockDiagonal
from pibinn_plugin.targets import Target
from pibinn_plugin.weights import distinct, global_scale, packed_weights


def use_brevitas_layers(packed: nn.Module) -> nn.Module:
    """Turn every packed weight into the latent of a Brevitas layer of the same λ, structure and signs, in place.

    Raises:
        ExportError: a weight is no weight of a layer that Brevitas has.
    """
    if not packed_weights(packed):
        return packed  # the float twin of a network, exported to compare sizes
    scale, framework = global_scale(packed), scheme_of("brevitas")
    for target in map(_dense_where_brevitas_needs_it, with_float_weights(packed)):
        for place in distinct(target.places):
            try:
                framework.check(target, place)
            except TargetError as error:
                raise ExportError(
                    f"{place.name!r} cannot be written through Brevitas, which has linear, convolution and "
                    f"compact layers: export as onnx, pt2 or aoti ({error})"
                ) from error
            framework.attach(target, place, scale)
    return packed.eval()


def _dense_where_brevitas_needs_it(target: Target) -> Target:
    # Brevitas' exporters write compact layers of blocks and bands alone, and the ONNX exporter that they use ends the
    # process with a division by zero at a block without elements.
    if not target.compact or (
        isinstance(target.structure, BlockDiagonal | Banded) and not has_empty_blocks(target.structure)
    ):
        return target
    if not all(map(is_stock_compact, target.places)):
        raise ExportError(f"{target} has empty blocks, or a structure that Brevitas' exporters cannot write")
    return to_dense_layer(target)


def export_through_brevitas(
    exporter: Callable[..., Any], packed: nn.Module, args: tuple[Tensor, ...], path: Path
) -> None:
    """Write a packed model, which is changed, with one of Brevitas' exporters."""
    exporter(
        use_brevitas_layers(packed),
        args=args,
        export_path=str(path),
        dynamo=False,  # through it Brevitas writes no quantized biases
        opset_version=18,
        keep_initializers_as_inputs=False,
    )
