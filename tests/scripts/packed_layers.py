"""A layer made of packed signs, without the network that they were trained in."""

from torch import nn

from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import UnpackSigns, multiply_bits, read_from_bits


def packed_layer(packed, scale, bias=None, compact=False):
    rows, columns = packed.shape
    has_bias = bias is not None
    layer = CompactLinear(columns, rows, packed.structure, has_bias) if compact else nn.Linear(columns, rows, has_bias)
    if has_bias:
        layer.bias = nn.Parameter(bias)
    read_from_bits(layer, "weight", UnpackSigns(scale, packed, compact, scale.value.dtype), packed.bits)
    multiply_bits(layer)
    return layer
