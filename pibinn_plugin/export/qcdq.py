"""QCDQ through Brevitas: int8 weights and ``DequantizeLinear``, in standard ONNX. Run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
from brevitas.export import export_onnx_qcdq
from onnx_ir.passes.common import DeduplicateInitializersPass
from torch import Tensor, nn

from pibinn_plugin.export.brevitas_layers import export_through_brevitas
from pibinn_plugin.export.onnx import runner
from pibinn_plugin.export.onnx_traces import strip_traces

__all__ = ["DYNAMIC_BATCH", "runner", "write"]

DYNAMIC_BATCH = False
_UNLIMITED = 2**31


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Write the file."""
    export_through_brevitas(export_onnx_qcdq, packed, args, path)
    graph = onnx_ir.from_proto(onnx.load(path))
    DeduplicateInitializersPass(size_limit=_UNLIMITED)(graph)  # torch writes a folded constant once a reader
    model = onnx_ir.to_proto(graph)
    strip_traces(model)
    onnx.save(model, path)
