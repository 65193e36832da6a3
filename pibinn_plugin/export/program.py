"""The packed model as a ``torch.export`` program: what onnx, pt2, aoti and executorch are written from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from pibinn_plugin.export.float_layers import PackedWeight, packed_weights, replace_by_float_layers
from pibinn_plugin.export.rules import narrow
from pibinn_plugin.export.unpack import UnpackForExport, row_major_bits
from pibinn_plugin.packing import packed_signs_of
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.structure import BlockDiagonal, Dense
from pibinn_plugin.workflow import global_scale

# What torch notes at each node about this machine's source files: of no use to who runs the program, and most of it.
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")


def program_of(packed: nn.Module, args: tuple[Tensor, ...], dynamic_batch: bool = True) -> Any:
    """A ``torch.export.ExportedProgram`` of a packed model, which is used up.

    Its weights are their packed signs, unpacked in the graph; nothing in it refers to this package.
    """
    # Without packed weights it is the float twin of a network, exported to compare sizes.
    model = _with_exportable_weights(packed) if any(True for _ in packed_signs_of(packed)) else packed
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} for _ in args)
        # A batch of one would be taken for a constant.
        args = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in args)
    with torch.no_grad(), _without_quant_tensors(model, args):
        program: Any = torch.export.export(model, args, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        for key in _TRACES:
            node.meta.pop(key, None)
    return program


@contextmanager
def _without_quant_tensors(model: nn.Module, args: tuple[Tensor, ...]) -> Iterator[None]:
    """Have Brevitas layers with activation quantizers pass tensors: torch.export cannot trace its ``QuantTensor``."""
    if not any(hasattr(module, "weight_quant") for module in model.modules()):
        yield
        return
    from brevitas.export.inference import quant_inference_mode

    from pibinn_plugin.schemes import brevitas_export

    brevitas_export.register()
    with quant_inference_mode(model):
        model(*args)  # attaches the handlers
        yield


def _with_exportable_weights(model: nn.Module) -> nn.Module:
    """Replace every packed weight by a buffer of bits and an `UnpackForExport`, in place."""
    scale = global_scale(model)
    weights = list(packed_weights(model, scale.value.dtype))
    model = replace_by_float_layers(model, weights, _float_linear)
    for weight in weights:
        if weight.in_place:
            _unpack_in_place(weight, scale)
        else:
            _unpack_in_front(model.get_submodule(weight.module_name), weight, scale)
    value = scale().detach()
    del scale.value
    scale.register_buffer("value", value)
    return model


def _unpack_in_front(layer: nn.Module, weight: PackedWeight, scale: GlobalScale) -> None:
    compact = isinstance(layer, _BlockDiagonalLinear)
    in_stored_order = compact or isinstance(weight.packed.structure, Dense)
    del layer.weight
    layer.register_buffer("weight", weight.packed.bits if in_stored_order else row_major_bits(weight.packed))
    unpack = UnpackForExport(scale, weight.packed, compact, weight.dtype)
    parametrize.register_parametrization(layer, "weight", unpack, unsafe=True)


def _unpack_in_place(weight: PackedWeight, scale: GlobalScale) -> None:
    chain = weight.module.parametrizations[weight.parameter_name]
    chain[0] = UnpackForExport(scale, weight.packed, weight.compact, weight.dtype)
    if not weight.compact:
        chain.original = row_major_bits(weight.packed)
    if hasattr(weight.module, "weight_quant"):
        # A Brevitas layer would quantize once more, with a mask of a byte for each element.
        weight.module.weight_quant.tensor_quant.sign_quantizer = _Quantized(scale)


class _Quantized(nn.Module):
    """In the place of a `SignQuantizer` whose weight is quantized already."""

    def __init__(self, scale: GlobalScale) -> None:
        super().__init__()
        self._scale = (scale,)

    @property
    def scale(self) -> GlobalScale:
        return self._scale[0]

    @override
    def forward(self, weight: Tensor) -> Tensor:
        return weight


def _float_linear(weight: PackedWeight) -> nn.Module:
    structure, (rows, columns) = weight.packed.structure, weight.packed.shape
    if isinstance(structure, BlockDiagonal) and structure.rows is None:
        return _BlockDiagonalLinear(structure, rows, columns)
    return nn.Linear(columns, rows, device="meta")


class _BlockDiagonalLinear(nn.Module):
    """Equal blocks, multiplied as blocks; permutations are stored in the narrowest integers."""

    weight: Tensor
    bias: Tensor | None
    column_order: Tensor
    row_place: Tensor

    def __init__(self, structure: BlockDiagonal, rows: int, columns: int) -> None:
        super().__init__()
        self.shape, self.ordered = (rows, columns), BlockDiagonal(structure.blocks)
        self.weight = nn.Parameter(torch.empty(self.ordered.compact_shape(self.shape), device="meta"))
        self.is_permuted = structure.row_order is not None
        if structure.row_order is not None and structure.column_order is not None:
            self.register_buffer("column_order", narrow(torch.tensor(structure.column_order)))
            self.register_buffer("row_place", narrow(torch.tensor(structure.row_order).argsort()))

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.is_permuted:
            input = input.index_select(-1, self.column_order.to(torch.int64))
        output = self.ordered.linear(input, self.weight, self.shape)
        if self.is_permuted:
            output = output.index_select(-1, self.row_place.to(torch.int64))
        return output if self.bias is None else output + self.bias
