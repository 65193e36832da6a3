"""QONNX through Brevitas: ``BipolarQuant`` times the mask. Run by qonnx, and read by what is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxscript.optimizer
import torch
from brevitas.export import export_qonnx
from brevitas.export.onnx.qonnx.manager import QONNXManager
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model
from torch import Tensor, nn

from pibinn_plugin.export.brevitas_layers import export_through_brevitas
from pibinn_plugin.export.onnx_traces import strip_traces
from pibinn_plugin.export.verify import Runner

DYNAMIC_BATCH = False  # qonnx infers the shapes of all tensors


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Write the file, with constants folded and all shapes inferred, as qonnx' executor and compilers expect it."""
    export_through_brevitas(export_qonnx, QONNXManager, packed, args, path)
    model = onnx.load(path)
    strip_traces(model)
    model = onnxscript.optimizer.optimize(model)  # qonnx folds constants too, but takes a pass over the graph for each
    _slice_instead_of_split(model.graph)
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


def _slice_instead_of_split(graph: Any) -> None:
    """Replace each Split by one Slice an output, in place: qonnx loses all outputs but the first of what it folds."""
    sizes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Split" and len(node.input) == 2 and node.input[1] in sizes:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            nodes += _slices(graph, node, sizes[node.input[1]].cumsum(), axis)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _slices(graph: Any, split: Any, ends: Any, axis: int) -> list[Any]:
    nodes = []
    for output, start, end in zip(split.output, [0, *ends[:-1]], ends, strict=True):
        names = [f"{output}_{bound}" for bound in ("start", "end", "axis")]
        for name, value in zip(names, (start, end, axis), strict=True):
            graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], [int(value)]))
        nodes.append(onnx.helper.make_node("Slice", [split.input[0], *names], [output], name=f"{output}_slice"))
    return nodes
