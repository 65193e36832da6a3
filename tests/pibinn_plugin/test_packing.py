"""Packed bits against numpy's ``packbits``, and packed weights against the quantizer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pibinn_plugin import StructureError
from pibinn_plugin.bits import pack_bits, unpack_bits
from pibinn_plugin.packing import PackedSigns, unpack_signs
from pibinn_plugin.quantizer import GlobalScale, quantize_sign
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask
from pibinn_plugin.unpack_signs import UnpackSigns

CASES = [
    (Dense(), (3, 5)),
    (Dense(), (2, 3, 3)),
    (Banded(1, 2), (4, 6)),
    (BlockDiagonal(3), (3, 9)),
    (BlockDiagonal(rows=(1, 3), columns=(2, 1)), (4, 3)),
    (BlockDiagonal(2, row_order=(3, 0, 2, 1), column_order=(1, 0, 3, 2)), (4, 4)),
    (Mask([[1, 0, 1], [0, 1, 1]]), (2, 3)),
]


@given(hnp.arrays(bool, st.integers(0, 70)))
def test_bits_are_numpys_little_endian_packbits(flags):
    packed = pack_bits(torch.from_numpy(flags))
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(flags, bitorder="little"))
    assert np.array_equal(unpack_bits(packed, len(flags)).numpy(), flags)


@given(hnp.arrays(np.uint8, st.integers(0, 9)))
def test_unpacking_is_numpys_unpackbits(packed):
    count = 8 * len(packed)
    assert np.array_equal(
        unpack_bits(torch.from_numpy(packed), count).numpy(), np.unpackbits(packed, bitorder="little") != 0
    )
    assert np.array_equal(
        unpack_signs(torch.from_numpy(packed), (count,), torch.float64).numpy(),
        2.0 * np.unpackbits(packed, bitorder="little") - 1,
    )


@pytest.mark.parametrize(("structure", "shape"), CASES)
def test_stored_layout_is_the_structural_signs_in_compact_order(structure, shape):
    latent = torch.randn(shape)
    packed = PackedSigns.pack(latent, structure, shape)
    structural = latent.flatten()[structure.positions(shape)]
    assert np.array_equal(packed.bits.numpy(), np.packbits(structural.numpy() >= 0, bitorder="little"))
    assert packed.bits.numel() == math.ceil(packed.nnz / 8)
    assert torch.equal(packed.signs(), torch.where(structure.to_compact(latent) >= 0, 1.0, -1.0))
    from_compact = PackedSigns.pack(structure.to_compact(latent), structure, shape, compact=True)
    assert torch.equal(from_compact.bits, packed.bits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("structure", "shape"), CASES)
def test_packed_weight_is_the_quantized_weight_bit_for_bit(structure, shape, dtype):
    latent = torch.randn(shape, dtype=dtype)
    latent.view(-1)[0] = 0.0
    scale = torch.tensor([0.1], dtype=dtype)
    packed = PackedSigns.pack(latent, structure, shape)
    weight, expected = packed.weight(scale, False, dtype), quantize_sign(latent, scale, structure.mask(shape))
    assert weight.dtype == dtype
    integer = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    assert torch.equal(weight.view(integer), expected.view(integer))  # also +0.0 against -0.0
    assert torch.equal(packed.weight(scale, True, dtype), structure.to_compact(expected))


def test_sign_of_zero_is_packed_as_plus_one():
    assert PackedSigns.pack(torch.tensor([[0.0, -0.0, -1e-45]]), Dense(), (1, 3)).bits.tolist() == [0b011]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_without_a_finite_value_are_refused(value):
    """An infinite latent is refused too: in training it gives NaN, not a sign."""
    latent = torch.ones(4, 4)
    latent[0, 3] = value
    PackedSigns.pack(latent, BlockDiagonal(2), (4, 4))  # outside the structure nothing is stored
    latent[3, 3] = value
    with pytest.raises(StructureError, match="not finite"):
        PackedSigns.pack(latent, BlockDiagonal(2), (4, 4))


@pytest.mark.parametrize(
    ("bits", "structure", "shape"),
    [
        (torch.zeros(3, dtype=torch.uint8), Dense(), (4, 4)),
        (torch.zeros(1, dtype=torch.uint8), Dense(), (4, 4)),
        (torch.zeros(2, dtype=torch.int8), Dense(), (4, 4)),
        (torch.zeros(1, 2, dtype=torch.uint8), Dense(), (4, 4)),
        (torch.zeros(2, dtype=torch.uint8), BlockDiagonal(2), (4, 4)),
        (torch.zeros(1, dtype=torch.uint8), BlockDiagonal(3), (4, 4)),
    ],
)
def test_bits_that_do_not_fit_are_refused(bits, structure, shape):
    with pytest.raises(StructureError):
        PackedSigns(bits, structure, shape)


@pytest.mark.parametrize("structure", [Banded(0, 0), BlockDiagonal(2**31)])
def test_size_check_of_a_huge_shape_takes_no_memory(structure):
    """A damaged file can claim any shape; what does not fit its bits is refused before anything is unpacked."""
    with pytest.raises(StructureError, match="of shape"):
        PackedSigns(torch.zeros(1, dtype=torch.uint8), structure, (2**39, 2**39))
    with pytest.raises(StructureError, match="of shape"):
        PackedSigns(torch.zeros(1, dtype=torch.uint8), Banded(2**32 - 1, 2**32 - 1), (2**39, 2**39))


def test_gradient_of_the_scale_is_the_sum_over_signs():
    latent = torch.randn(4, 6)
    packed = PackedSigns.pack(latent, Banded(1, 1), (4, 6))
    upstream = torch.randn(4, 6)
    grads = []
    for weight_of in (
        lambda scale: packed.weight(scale, False, torch.float32),
        lambda scale: quantize_sign(latent, scale, Banded(1, 1).mask((4, 6))),
    ):
        scale = torch.tensor([0.5], requires_grad=True)
        (weight_of(scale) * upstream).sum().backward()
        grads.append(scale.grad)
    torch.testing.assert_close(*grads)


def test_unpack_parametrization_gives_the_weight_and_keeps_its_structure():
    scale = GlobalScale(0.5)
    bits = torch.tensor([0b01], dtype=torch.uint8)
    unpack = UnpackSigns(scale, PackedSigns(bits, BlockDiagonal(2), (2, 2)), False, torch.float64)
    weight = unpack(bits)
    assert weight.dtype == torch.float64
    assert weight.tolist() == [[0.5, 0.0], [0.0, -0.5]]
    assert list(unpack.parameters()) == []
    with pytest.raises(StructureError, match="prepare the model"):
        UnpackSigns(scale, PackedSigns(bits, Dense(), (2, 2)), False, torch.float32).load_state_dict(
            unpack.state_dict()
        )


def test_trap_unpacking_uses_no_shift():
    """``>>`` has no ONNX mapping: AND and a comparison have."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda bits: unpack_signs(bits, (16,), torch.float32))(
        torch.zeros(2, dtype=torch.uint8)
    )
    operators = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert any("bitwise_and" in name for name in operators)
    assert not any("shift" in name for name in operators)
