"""torchao's own cases for a tensor subclass, on the packed tensor, with every kind of structure."""

import unittest

import pytest
import torch
from torchao.testing.utils import TorchAOBasicTestCase, TorchAOCompileTestCase

from pibinn_plugin.schemes.torchao import PIBiNNTensor
from pibinn_plugin.structure import BlockDiagonal, Dense, Mask

ROWS, COLUMNS = 4, 128  # of the weights in torchao's cases
PATTERN = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 3 > 0

# One bit of a Gaussian weight keeps 2/π of its energy: 4.4 dB. A structure drops what lies outside of it.
STRUCTURES = {
    "dense": (Dense(), 3.0),
    "blocks": (BlockDiagonal(4), 0.0),
    "uneven": (BlockDiagonal(rows=(1, 3), columns=(100, 28)), 0.0),
    "mask": (Mask(PATTERN), 1.0),
}


def cases(base, structure, least):
    """A subclass of torchao's cases for one structure."""
    fields = {
        "TENSOR_SUBCLASS": PIBiNNTensor,
        "FACTORY_FN": staticmethod(PIBiNNTensor.from_hp),
        "kwargs": {"structure": structure},
        "LINEAR_MIN_SQNR": least,
    }
    if base.__name__ == "TorchAOBasicTestCase" and not torch.cuda.is_available():
        fields["test_device1_to_device2_device1_cpu_device2_cpu"] = unittest.skip("calls .cuda()")(lambda self: None)
    return type(base.__name__, (base,), fields)


for name, (structure, least) in STRUCTURES.items():
    for base in (TorchAOBasicTestCase, TorchAOCompileTestCase):
        collected = cases(base, structure, least)
        collected.__name__ = f"Test{base.__name__.removeprefix('TorchAO')}{name.title()}"
        globals()[collected.__name__] = collected
del base, collected, TorchAOBasicTestCase, TorchAOCompileTestCase


@pytest.mark.parametrize("name", STRUCTURES)
def test_slices_and_transposes_are_those_of_the_dense_weight(name):
    weight = PIBiNNTensor.from_hp(torch.randn(ROWS, COLUMNS), STRUCTURES[name][0])
    dense = weight.dequantize()
    assert torch.equal(weight.t(), dense.t())
    assert torch.equal(weight[1:3], dense[1:3])
    assert torch.equal(weight.narrow(1, 5, 7), dense.narrow(1, 5, 7))
