"""QONNX through Brevitas: ``BipolarQuant`` times the mask. Run by qonnx, and read by what is built on it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxscript.optimizer
import torch
from brevitas.export import export_qonnx
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model
from torch import Tensor, nn

from pibinn_plugin.export.brevitas_layers import export_through_brevitas
from pibinn_plugin.export.onnx_traces import strip_traces
from pibinn_plugin.export.qonnx_graph import (
    name_each_input_once,
    quantize_transposes_apart,
    slice_instead_of_split,
    state_shapes_of_weights,
)
from pibinn_plugin.export.verify import Runner

DYNAMIC_BATCH = False  # qonnx infers the shapes of all tensors


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Write the file, with constants folded and all shapes inferred, as qonnx' executor and compilers expect it."""
    export_through_brevitas(export_qonnx, packed, args, path)
    model = onnx.load(path)
    strip_traces(model)
    slice_instead_of_split(model.graph)
    state_shapes_of_weights(model.graph)
    # qonnx folds constants too, but infers the shapes of the whole graph after each: nothing may be left to it.
    model = onnxscript.optimizer.optimize(model)
    name_each_input_once(model.graph)
    quantize_transposes_apart(model.graph)
    cleanup_model(ModelWrapper(model)).save(str(path))


def runner(path: Path) -> Runner:
    """Load the file; what comes back runs it."""
    model = ModelWrapper(str(path))
    names = [node.name for node in model.graph.input]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        outputs = execute_onnx(model, feed)
        return [torch.from_numpy(outputs[node.name]) for node in model.graph.output]

    return run
