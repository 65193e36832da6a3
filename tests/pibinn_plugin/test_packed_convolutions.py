"""Which packed convolutions multiply their bits, and that all of them are the trained convolution."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import pibinn_plugin as pb
from pibinn_plugin.functional import kernel
from pibinn_plugin.packed import PackedLinear, unpacked_bytes, use_int8_activations
from pibinn_plugin.packed_convolutions import PackedConv1d, PackedConv2d

needs_kernel = pytest.mark.skipif(kernel() == "torch", reason="the native kernel was not built, or is switched off")

IMAGES = torch.randn(2, 16, 9, 7)
CHANNELS_LAST = IMAGES.to(memory_format=torch.channels_last)


def pair(layer, structure=None):
    """A prepared layer and its packed copy."""
    prepared = pb.prepare(nn.Sequential(layer), {"0.weight": structure}).eval()
    return prepared, pb.convert(prepared)


@torch.no_grad()
def assert_same(prepared, packed, x):
    expected = copy.deepcopy(prepared).double()(x.double())
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-4, atol=1e-4)


@given(
    st.sampled_from((1, 2, 4)),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from((0, 1, 2, "same", "valid")),
    st.integers(1, 2),
    st.sampled_from(("zeros", "reflect", "circular")),
    st.booleans(),
    st.sampled_from((IMAGES, CHANNELS_LAST, IMAGES[..., :1], IMAGES.flatten(2), IMAGES[0], IMAGES[:0])),
)
def test_any_convolution_is_the_trained_one(groups, width, stride, padding, dilation, mode, bias, x):
    """Whoever computes it: geometry that torch refuses is refused as torch does."""
    make = nn.Conv1d if x is not IMAGES[0] and x.ndim == 3 else nn.Conv2d
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode, "groups": groups}
    try:
        prepared, packed = pair(make(16, 32, width, bias=bias, **options))
        expected = prepared(x)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)) as ours, torch.no_grad():
            packed = pb.convert(pb.prepare(make(16, 32, width, bias=bias, **options), {"weight": None}))
            packed(x)
        assert str(ours.value) == str(error)
        return
    with torch.no_grad():
        y = packed(x)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-4)
    assert y.stride() == expected.stride() or y.numel() == 0


@needs_kernel
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(16, 8, 5), IMAGES.flatten(2)),
        (nn.Conv2d(16, 8, 3), IMAGES),
        (nn.Conv2d(16, 8, 3), CHANNELS_LAST),
        (nn.Conv2d(16, 64, 3), torch.randn(20, 16, 9, 9).to(memory_format=torch.channels_last)),
        (nn.Conv2d(16, 40, 3), torch.randn(20, 16, 9, 9)),
        (nn.Conv2d(64, 64, 1), torch.randn(20, 64, 9, 9)),
        (nn.Conv2d(16, 8, 3, dilation=2), torch.randn(20, 16, 9, 9)),
        (nn.Conv1d(16, 8, 9), torch.randn(20, 16, 81)),
        (nn.Conv2d(16, 8, 3), torch.randn(12, 16, 9, 9)),
    ],
)
def test_no_weight_is_unpacked_for_inference(layer, x):
    prepared, packed = pair(layer)
    assert isinstance(packed[0], PackedConv1d | PackedConv2d)
    assert_same(prepared, packed, x)
    assert unpacked_bytes(packed) == 0


@needs_kernel
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(16, 16, 3, groups=16), IMAGES),  # too little to look up
        (nn.Conv2d(16, 64, 1), CHANNELS_LAST),
        (nn.Conv2d(16, 16, 3), torch.randn(20, 16, 9, 9).to(memory_format=torch.channels_last)),
        (nn.Conv2d(16, 39, 3), torch.randn(20, 16, 9, 9)),  # too few outputs for so many positions
        (nn.Conv2d(64, 80, 3, groups=4), torch.randn(20, 64, 9, 9)),
        (nn.Conv2d(1, 8, 9), torch.randn(20, 1, 17, 17)),
        (nn.Conv1d(16, 8, 7), torch.randn(20, 16, 81)),
        (nn.Conv2d(64, 63, 1), torch.randn(1, 64, 9, 9)),
    ],
)
def test_floats_convolve_where_they_are_faster(layer, x):
    prepared, packed = pair(layer)
    assert_same(prepared, packed, x)
    assert unpacked_bytes(packed) == layer.weight.nbytes


@pytest.mark.parametrize(
    ("layer", "structure"),
    [
        (nn.Conv2d(16, 8, 3), pb.Mask(torch.rand(8, 16, 3, 3) < 0.5)),
        (nn.ConvTranspose2d(16, 8, 3), None),
        (nn.Conv3d(16, 8, 1), None),
        (type("Own", (nn.Conv2d,), {})(16, 8, 3), None),
    ],
)
def test_other_convolutions_go_on_with_their_weight(layer, structure):
    prepared, packed = pair(layer, structure)
    assert not isinstance(packed[0], PackedConv1d | PackedConv2d)
    assert_same(prepared, packed, IMAGES[..., None] if isinstance(layer, nn.Conv3d) else IMAGES)


class Twice(nn.Module):
    def forward(self, value):
        return 2 * value


def test_convolution_follows_every_change():
    layer, x = nn.Conv2d(16, 8, 3), IMAGES
    packed = pair(layer)[1][0]
    other = pair(nn.Conv2d(16, 8, 3))[1][0]

    def check(changed=packed):
        with torch.no_grad():
            expected = nn.functional.conv2d(x, changed.weight, changed.bias, changed.stride, changed.padding)
            torch.testing.assert_close(changed(x), expected, rtol=1e-4, atol=1e-4)

    check()
    for change in (
        lambda: packed._rule.scale.set(0.7),
        lambda: packed.bits.bitwise_not_(),
        lambda: packed.load_state_dict(other.state_dict()),
        lambda: packed.load_state_dict(pair(nn.Conv2d(16, 8, 3))[1][0].state_dict(), assign=True),
        lambda: packed.bias.data.neg_(),
        lambda: setattr(packed, "stride", (2, 1)),
        lambda: setattr(packed, "padding", (1, 2)),
        lambda: setattr(packed, "padding", "valid"),
    ):
        with torch.no_grad():
            before = packed(x)
        change()
        with torch.no_grad():
            after = packed(x)
        assert before.shape != after.shape or not torch.equal(before, after)
        check()
        check(copy.deepcopy(packed))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_parametrized_later_takes_part(name):
    prepared, packed = pair(nn.Conv2d(16, 8, 3))
    for model in (prepared, packed):
        parametrize.register_parametrization(model[0], name, Twice())
    assert_same(prepared, packed, IMAGES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast_are_those_of_torch(dtype):
    prepared, packed = pair(nn.Conv2d(16, 8, 3))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(IMAGES).dtype == prepared(IMAGES).dtype == torch.bfloat16
        x = IMAGES.to(dtype)
        torch.testing.assert_close(packed.to(dtype)(x), prepared.to(dtype)(x))


@pytest.mark.parametrize("x", [IMAGES[:, :15], IMAGES[..., :2], IMAGES.int(), IMAGES[0, 0]], ids=lambda x: str(x.shape))
def test_what_torch_refuses_is_refused_in_its_words(x):
    prepared, packed = pair(nn.Conv2d(16, 8, 3))
    with pytest.raises(RuntimeError) as expected:
        prepared(x)
    with torch.no_grad(), pytest.raises(RuntimeError) as error:
        packed(x)
    assert str(error.value) == str(expected.value)


def test_gradients_and_transforms_are_those_of_the_weight():
    prepared, packed = pair(nn.Conv2d(16, 8, 3))
    x = IMAGES.clone().requires_grad_()
    for model in (prepared, packed):
        model.gradient = torch.autograd.grad(model(x).square().sum(), x)[0]
        model.tangent = torch.func.jvp(model, (IMAGES,), (torch.ones_like(IMAGES),))[1].detach()
        with torch.no_grad():
            model.mapped = torch.func.vmap(model)(IMAGES.unsqueeze(1))
    for name in ("gradient", "tangent", "mapped"):
        torch.testing.assert_close(getattr(packed, name), getattr(prepared, name).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x", [IMAGES, CHANNELS_LAST], ids=["contiguous", "channels last"])
def test_compiled_it_is_the_same_convolution(x):
    packed = pair(nn.Conv2d(16, 8, 3))[1]
    compiled = torch.compile(packed, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), packed(x))
        packed[0].bits.bitwise_not_()
        packed[0]._rule.scale.set(0.9)
        torch.testing.assert_close(compiled(x), packed(x))
        torch.testing.assert_close(compiled(x[:1]), packed(x[:1]))


def test_export_and_pickle_know_nothing_of_it():
    packed = pair(nn.Conv2d(16, 8, 3))[1]
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), packed(IMAGES))
        program = torch.export.export(packed, (IMAGES,))
        torch.testing.assert_close(program.module()(IMAGES), packed(IMAGES), rtol=1e-4, atol=1e-4)
    assert not any("packed_convolution" in str(node.target) for node in program.graph.nodes)


def test_activations_in_int8_are_for_linear_layers():
    packed = pb.convert(pb.prepare(nn.Sequential(nn.Conv1d(16, 8, 3), nn.Linear(61, 4)), {"*.weight": None}))
    x = IMAGES.flatten(2)
    with torch.no_grad():
        before = packed[0](x)
        use_int8_activations(packed)
        assert torch.equal(packed[0](x), before)
    assert isinstance(packed[1], PackedLinear)
    assert packed[1].int8_activations
    with pytest.raises(pb.PIBiNNError, match="no PackedLinear"):
        use_int8_activations(pair(nn.Conv1d(16, 8, 3))[1])
