"""What every path of the kernel computes: adjoints, special values, strides, and a layer that is never out of date.

Run again for each path by ``make test-paths``.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_layers import BLOCKS, OTHERS, packed_layer

import pibinn_plugin as pb
from pibinn_plugin.functional import packed_linear_adjoint

BITS = "parametrizations.weight.original"


@given(st.sampled_from(BLOCKS + OTHERS), st.sampled_from([(), (1,), (3, 5), (17,), (0,)]), st.integers(0, 2**32))
def test_adjoint_is_the_product_with_the_transpose(case, batch, seed):
    structure, shape = case
    torch.manual_seed(seed)
    layer = packed_layer(structure, shape)
    weight, y = layer.weight.detach().double(), torch.randn(*batch, shape[0])
    x = packed_linear_adjoint(y, layer.bits, layer._rule.scale(), structure, shape)
    torch.testing.assert_close(x.double(), y.double() @ weight, rtol=1e-5, atol=1e-5)
    x = packed_linear_adjoint(y.double(), layer.bits, torch.tensor([0.5]), structure, shape)  # in plain torch
    torch.testing.assert_close(x, y.double() @ weight)


@pytest.mark.parametrize(("structure", "shape"), BLOCKS + OTHERS)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_infinite_missing_and_huge_inputs_keep_their_meaning(structure, shape, value):
    layer, x = packed_layer(structure, shape, bias=False), torch.zeros(9, shape[1])
    x[range(9), range(3, 3 + 9) if shape[1] > 12 else [i % shape[1] for i in range(9)]] = value
    blocks = [torch.nonzero(column).flatten() for column in layer.weight.detach().T]
    with torch.no_grad():
        for row in (slice(0, 9), slice(2, 3)):  # many samples, and one
            for sample, y in zip(x[row], layer(x[row]), strict=True):
                column = int(torch.nonzero(sample).item())
                expected = 0.5 * value * layer.weight[blocks[column], column].sign()
                torch.testing.assert_close(y[blocks[column]], expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_what_contiguous_inputs_give(dtype):
    structure, shape = BLOCKS[1]
    layer = packed_layer(structure, shape).to(dtype)
    wide = torch.randn(4, 36, 7, 2, dtype=dtype)
    with torch.no_grad():
        for x in (wide[..., 0].mT, wide[:, :, 3, 0], wide[1:, :, 3, 1].expand(3, 36), wide[0, :, 0, 0].expand(9, 36)):
            assert torch.equal(layer(x), layer(x.contiguous()))


# ------------------------------------------------------------------------------------------------- never out of date


@pytest.mark.parametrize(("structure", "shape"), BLOCKS + OTHERS)
def test_layer_follows_every_change_of_its_bits_scale_and_bias(structure, shape):
    layer, other, x = packed_layer(structure, shape), packed_layer(structure, shape), torch.randn(3, shape[1])

    def check(changed=layer):
        weight, bias = changed.weight.detach().double(), changed.bias.detach().double()
        with torch.no_grad():
            y = changed(x.to(changed.bias.dtype))
        tolerance = 1e-5 if y.dtype == torch.float32 else 0.05
        torch.testing.assert_close(y.double(), x.double() @ weight.T + bias, rtol=tolerance, atol=tolerance)

    check()
    for change in (
        lambda: layer._rule.scale.set(0.7),
        lambda: layer.bits.data.bitwise_not_(),
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: layer.bits.data.bitwise_not_(),
        lambda: layer.load_state_dict(other.state_dict(), assign=True),
        lambda: layer.bias.data.neg_(),
        lambda: layer.parametrizations.weight.register_buffer("original", layer.bits.bitwise_not()),
    ):
        before = layer(x)
        change()
        assert not torch.equal(layer(x), before)
        check()
    check(copy.deepcopy(layer))
    check(copy.deepcopy(layer).to(torch.bfloat16))
    swapped = torch.func.functional_call(layer, {BITS: ~layer.bits, "bias": torch.zeros_like(layer.bias)}, x)
    torch.testing.assert_close(swapped, -x @ layer.weight.T)


@pytest.mark.parametrize("value", [-0.3, 0.0, 1e-45, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_takes_the_scale_as_the_global_scale_gives_it(value, dtype):
    layer = packed_layer(pb.BlockDiagonal(2), (4, 6), bias=False)
    layer._rule.scale.to(dtype).value.data.fill_(value)
    x = torch.randn(3, 6) * 1e37  # so that a λ which is almost nothing shows
    with torch.no_grad():
        fused = layer(x)
    differentiable = layer(x)
    assert differentiable.requires_grad
    torch.testing.assert_close(fused, differentiable.detach(), rtol=1e-5, atol=0, equal_nan=True)
