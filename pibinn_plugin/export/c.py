"""One C99 file, from emx-onnx-cgen, for processors without an operating system. Run by whoever compiles it.

The file has no heap and no file access: its constants are ``static const`` (flash), its intermediate values lie in
static arrays that they share (RAM), and the signs of the weights stay packed in both.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from pathlib import Path

import emx_onnx_cgen.compiler
import numpy
import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import DeduplicateInitializersPass
from torch import Tensor, nn

from pibinn_plugin.errors import ExportError
from pibinn_plugin.export.c_compiler import host_compiler, shared_library
from pibinn_plugin.export.c_memory import share_memory
from pibinn_plugin.export.c_signs import pack_constants
from pibinn_plugin.export.c_source import entry_function
from pibinn_plugin.export.onnx import OPSET
from pibinn_plugin.export.onnx_traces import strip_traces
from pibinn_plugin.export.program import program_of, use_exportable_weights
from pibinn_plugin.export.unpack import unpack_now
from pibinn_plugin.export.verify import Runner

DYNAMIC_BATCH = False  # every array of the file has its size written beside it

_UNLIMITED = 2**31
_FOLDED_ELEMENTS = 64  # arithmetic on larger constants is left to the device: its result may need 32 bits an element
# What only moves the elements of a constant leaves them the signs that they are.
_MOVES = frozenset(
    (
        *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice"),
        *("Split", "Squeeze", "Transpose", "Unsqueeze"),
    )
)
_DTYPES = {
    "float": numpy.float32,
    "double": numpy.float64,
    "bool": numpy.bool_,
    **{f"{sign}int{bits}_t": numpy.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Write the C file; its function has the name of the file."""
    host_compiler()  # before the minutes that the rest may take
    options = emx_onnx_cgen.compiler.CompilerOptions(
        model_name=_identifier(path.stem), large_temp_threshold_bytes=0, large_weight_threshold=0
    )
    source = emx_onnx_cgen.compiler.Compiler(options).compile(_graph_of_constants(packed, args))
    path.write_text(share_memory(pack_constants(source)))


def runner(path: Path) -> Runner:
    """Compile the file with the host's compiler and load it; what comes back runs it."""
    entry = entry_function(path.read_text())
    folder = tempfile.TemporaryDirectory()
    function = getattr(ctypes.CDLL(str(shared_library(path, Path(folder.name)))), entry.name)
    outputs = [parameter for parameter in entry.parameters if not parameter.is_constant]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        arrays = [numpy.ascontiguousarray(x.numpy()) for x in inputs]
        expected = [parameter for parameter in entry.parameters if parameter.is_constant]
        given = [(x.dtype, x.shape) for x in arrays]
        if given != [(_DTYPES[parameter.type], parameter.shape) for parameter in expected]:
            raise ExportError(f"the C function takes {expected}, not {given}")
        results = [numpy.zeros(parameter.shape, _DTYPES[parameter.type]) for parameter in outputs]
        function(*(ctypes.c_void_p(array.ctypes.data) for array in (*arrays, *results)))
        assert folder  # the library lies in it
        return [torch.from_numpy(result) for result in results]

    return run


def _graph_of_constants(packed: nn.Module, args: tuple[Tensor, ...]) -> object:
    """The network as an ``onnx.ModelProto`` whose weights are constants in the layout in which products read them."""
    use_exportable_weights(packed)  # first: it finds the blocks of layers that are dense otherwise
    unpack_now(packed)
    program = torch.onnx.export(
        program_of(packed, args, dynamic_batch=False), dynamo=True, optimize=False, opset_version=OPSET, verbose=False
    )
    assert program is not None  # it is with dynamo=True
    onnxscript.optimizer.optimize_ir(
        program.model, input_size_limit=_UNLIMITED, output_size_limit=_UNLIMITED, should_fold=_only_moves
    )
    DeduplicateInitializersPass(size_limit=_UNLIMITED)(program.model)
    model = program.model_proto
    strip_traces(model)
    return model


def _only_moves(node: onnx_ir.Node) -> bool | None:
    """Whether a node of constants is computed now: always where it moves elements, else where they are few."""
    sizes = [x.const_value.size for x in node.inputs if x is not None and x.const_value is not None]
    return None if node.op_type in _MOVES or max(sizes, default=0) <= _FOLDED_ELEMENTS else False


def _identifier(name: str) -> str:
    identifier = re.sub(r"\W", "_", name, flags=re.ASCII)
    return identifier if identifier[:1].isalpha() else f"network_{identifier}"
