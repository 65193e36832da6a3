"""QCDQ through Brevitas: int8 weights and ``DequantizeLinear``, in standard ONNX. Run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnx
from brevitas.export import export_onnx_qcdq
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager
from torch import Tensor, nn

from pibinn_plugin.export.brevitas_layers import export_through_brevitas
from pibinn_plugin.export.onnx import runner
from pibinn_plugin.export.onnx_traces import strip_traces

__all__ = ["DYNAMIC_BATCH", "runner", "write"]

DYNAMIC_BATCH = False


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Write the file."""
    export_through_brevitas(export_onnx_qcdq, StdQCDQONNXManager, packed, args, path)
    model = onnx.load(path)
    strip_traces(model)
    onnx.save(model, path)
