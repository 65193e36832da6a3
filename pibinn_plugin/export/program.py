"""The packed model as a ``torch.export`` program: what onnx, pt2, aoti and executorch are written from."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.export.rules import narrow
from pibinn_plugin.export.unpack import UnpackForExport, row_major_bits
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import stop_multiplying_bits
from pibinn_plugin.parametrized import set_class_before
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.schemes import loaded_schemes
from pibinn_plugin.structure import BlockDiagonal, Dense
from pibinn_plugin.weights import OneBitWeight, Place, distinct, global_scale, packed_weights

# What torch notes at each node about this machine's source files: of no use to who runs the program, and most of it.
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")


def program_of(packed: nn.Module, args: tuple[Tensor, ...], dynamic_batch: bool = True) -> Any:
    """A ``torch.export.ExportedProgram`` of a packed model, which is changed for it.

    Its weights are their packed signs, unpacked in the graph; nothing in it refers to this package.
    """
    if packed_weights(packed):  # else it is the float twin of a network, exported to compare sizes
        use_exportable_weights(packed)
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} for _ in args)
        # A batch of one would be taken for a constant.
        args = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in args)
    with torch.no_grad(), ExitStack() as stack:
        for scheme in loaded_schemes():
            stack.enter_context(scheme.traceable(packed, args))
        program: Any = torch.export.export(packed, args, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        for key in _TRACES:
            node.meta.pop(key, None)
    return program


def use_exportable_weights(model: nn.Module) -> None:
    """Put an `UnpackForExport` in front of the bits of every packed weight, in place, and λ in a buffer."""
    scale = global_scale(model)
    for weight in packed_weights(model):
        for place in distinct(weight.places):
            _make_exportable(weight, place, scale)
    value = scale().detach()
    del scale.value
    scale.register_buffer("value", value)


def _make_exportable(weight: OneBitWeight, place: Place, scale: GlobalScale) -> None:
    module: Any = place.module
    packed, compact = weight.packed, weight.compact
    is_linear = isinstance(module, nn.Linear | CompactLinear)
    if stop_multiplying_bits(module) and is_linear:  # a stock layer, whose product may be written in another way
        compact = isinstance(packed.structure, BlockDiagonal) and packed.structure.rows is None
        set_class_before(module, _BlockDiagonalLinear if compact else nn.Linear)
        if compact:
            module.prepare(packed.structure, packed.shape)
    chain = module.parametrizations[place.parameter_name]
    chain[0] = UnpackForExport(scale, packed, compact, weight.dtype)
    if not compact and not isinstance(packed.structure, Dense):
        chain.original = row_major_bits(packed)


class _BlockDiagonalLinear(nn.Module):
    """The class of a stock layer of equal blocks: multiplied as blocks, permutations in the narrowest integers."""

    weight: Tensor
    bias: Tensor | None
    column_order: Tensor
    row_place: Tensor

    def prepare(self, structure: BlockDiagonal, shape: tuple[int, int]) -> None:
        """Hold what the product needs beside the weight."""
        self.product_shape, self.ordered = shape, BlockDiagonal(structure.blocks)
        self.is_permuted = structure.row_order is not None
        if structure.row_order is not None and structure.column_order is not None:
            self.register_buffer("column_order", narrow(torch.tensor(structure.column_order)))
            self.register_buffer("row_place", narrow(torch.tensor(structure.row_order).argsort()))

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.is_permuted:
            input = input.index_select(-1, self.column_order.to(torch.int64))
        output = self.ordered.linear(input, self.weight, self.product_shape)
        if self.is_permuted:
            output = output.index_select(-1, self.row_place.to(torch.int64))
        return output if self.bias is None else output + self.bias
