"""Packed layers for the tests of the kernel."""

import torch
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.packed import keep_unpacked, multiply_bits
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.unpack_signs import UnpackSigns, read_from_bits

BLOCKS = [
    (pb.Dense(), (5, 40)),
    (pb.BlockDiagonal(3), (21, 36)),
    (pb.BlockDiagonal(rows=(1, 0, 9), columns=(5, 2, 33)), (10, 40)),
    (pb.BlockDiagonal(2, row_order=(3, 0, 2, 1), column_order=(1, 0, 3, 2)), (4, 4)),
]
OTHERS = [(pb.Banded(1, 2), (4, 6)), (pb.Mask([[1, 0, 1], [0, 1, 1]]), (2, 3))]


def packed_layer(structure, shape, bias=True):
    """A layer of random signs, with λ = 0.5, which multiplies its bits however small it is."""
    packed = PackedSigns.pack(torch.randn(shape), structure, shape)
    layer = nn.Linear(shape[1], shape[0], bias)
    if bias:
        nn.init.normal_(layer.bias)
    read_from_bits(layer, "weight", UnpackSigns(GlobalScale(0.5), packed, False, torch.float32), packed.bits)
    multiply_bits(layer)
    keep_unpacked(layer, False)
    return layer


class PackedModel(nn.Module):
    """One packed layer and λ, which is the model's and moves with it."""

    def __init__(self, structure, shape):
        super().__init__()
        self.layer = packed_layer(structure, shape)
        self.pibinn_scale = self.layer.parametrizations["weight"][0].scale

    def forward(self, x):
        return self.layer(x)
