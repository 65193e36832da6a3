"""ONNX of standard operators: packed signs as uint8 initializers, unpacked in the graph. Run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from pibinn_plugin.export.onnx_traces import strip_traces
from pibinn_plugin.export.program import program_of
from pibinn_plugin.export.verify import Runner

DYNAMIC_BATCH = True
OPSET = 18
_FOLDED_ELEMENTS = 64  # constant expressions of more elements stay expressions


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Write the ONNX file."""
    program = torch.onnx.export(
        program_of(packed, args), dynamo=True, optimize=False, opset_version=OPSET, verbose=False
    )
    assert program is not None  # it is with dynamo=True
    onnxscript.optimizer.optimize_ir(
        program.model,
        input_size_limit=_FOLDED_ELEMENTS,
        output_size_limit=_FOLDED_ELEMENTS,
        should_fold=_is_not_of_bits,
    )
    model = program.model_proto
    strip_traces(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def runner(path: Path) -> Runner:
    """Load the file; what comes back runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # initializers it cannot fold and the like, which are as intended
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


def _is_not_of_bits(node: onnx_ir.Node) -> bool | None:
    """Keep the optimizer from unpacking the bits of small layers into floats; None leaves the choice to it."""
    return False if any(x is not None and x.dtype == onnx_ir.DataType.UINT8 for x in node.inputs) else None
