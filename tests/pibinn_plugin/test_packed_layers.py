"""Which packed layers multiply their bits: the stock ones with nothing attached; the others do what they did."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pibinn_plugin import (
    Banded,
    BlockDiagonal,
    Dense,
    Mask,
    PIBiNNError,
    ScaleError,
    convert,
    global_scale,
    prepare,
    unpack_signs,
)
from pibinn_plugin.kernel import native
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import PackedCompactLinear, PackedLinear, keep_unpacked, unpacked_bytes, use_int8_activations
from pibinn_plugin.packing import PackedSigns


class Twice(nn.Module):
    def forward(self, value):
        return 2 * value


class OwnLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


class OwnCompactLinear(CompactLinear):
    """No other forward, but a class that a user may look for."""


def own_forward(layer):
    layer.forward = lambda input: 2 * input  # as wrappers of models do


def doubled_gradient(module, gradients, _):
    return tuple(None if gradient is None else 2 * gradient for gradient in gradients)


ATTACHMENTS = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda module, inputs, output: 2 * output),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "backward hook": lambda layer: layer.register_full_backward_hook(doubled_gradient),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda module, g: (2 * g[0],)),
    "forward of its own": own_forward,
    "parametrized bias": lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
    "weight parametrized twice": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
}
LAYERS = [lambda: nn.Linear(8, 6), lambda: CompactLinear(8, 6, BlockDiagonal(2))]


def outputs_and_gradient(model, x):
    x = x.clone().requires_grad_()
    output = model(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    return output, gradient


def assert_same(model, packed):
    x = torch.randn(5, 8)
    for ours, theirs in zip(outputs_and_gradient(packed, x), outputs_and_gradient(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x))


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("name", ATTACHMENTS)
def test_a_layer_with_something_attached_goes_on_with_its_weight(name, make):
    model = prepare(nn.Sequential(make()), {"0.weight": None})
    ATTACHMENTS[name](model[0])
    packed = convert(model)
    assert not isinstance(packed[0], PackedLinear | PackedCompactLinear)
    assert_same(model, packed)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("name", ATTACHMENTS)
def test_what_is_attached_to_a_packed_layer_takes_part(name, make):
    model = prepare(nn.Sequential(make()), {"0.weight": None})
    packed = convert(model)
    assert isinstance(packed[0], PackedLinear | PackedCompactLinear)
    for each in (model, packed):
        ATTACHMENTS[name](each[0])
    assert_same(model, packed)


COMPACT = [
    Dense(),
    BlockDiagonal(2),
    BlockDiagonal(2, row_order=(3, 0, 2, 1, 5, 4), column_order=(1, 0, 3, 2, 7, 6, 5, 4)),
    BlockDiagonal(rows=(1, 5), columns=(6, 2)),
    Banded(1, 2),
    Mask(torch.arange(48).view(6, 8) % 3 > 0),
]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("structure", COMPACT, ids=repr)
def test_the_weight_that_is_read_is_that_of_training_in_every_mode(structure, compact):
    """Its shape too: with gradients and without, kept and not."""
    layer = CompactLinear(8, 6, structure) if compact else nn.Linear(8, 6)
    model = prepare(layer, {"weight": structure})
    packed, expected = convert(model), model.weight.detach()
    for enabled in (True, False):
        keep_unpacked(packed, enabled)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                for weight in (packed.weight, packed.weight):
                    assert weight.shape == expected.shape
                    assert torch.equal(weight, expected)


@torch.no_grad()
@pytest.mark.parametrize("small", [2**16, 0], ids=["unpacked by the graph", "kept"])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("structure", COMPACT, ids=repr)
def test_compiled_code_reads_that_weight_too(structure, compact, small, monkeypatch):
    """Before anything else has read it, after its bits, λ and the weight itself were written to, and kept or not."""
    monkeypatch.setattr(unpack_signs, "_SMALL_IN_GRAPHS", small)
    packed = convert(prepare(CompactLinear(8, 6, structure) if compact else nn.Linear(8, 6), {"weight": structure}))
    bits, scale = packed.parametrizations.weight.original, global_scale(packed)
    compiled = torch.compile(lambda: packed.weight.clone(), fullgraph=True, backend="aot_eager")
    changes = [
        lambda: None,
        lambda: bits[:1].bitwise_xor_(1),
        lambda: scale.set(0.3),
        lambda: scale.value.neg_(),
        lambda: packed.weight.data.fill_(2),
        lambda: keep_unpacked(packed, False),
        lambda: keep_unpacked(packed, True),
    ]
    for change in changes:
        change()
        weight, kept = compiled(), unpacked_bytes(packed)
        signs = PackedSigns(bits, structure, (6, 8))
        assert torch.equal(weight, signs.weight(scale(), compact, torch.float32))
        assert change is not changes[-2] or kept == 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "stays_packed"),
    [
        (CompactLinear(512, 256, BlockDiagonal(8)), False),
        (CompactLinear(1024, 512, BlockDiagonal(16)), False),  # twice the weights, in blocks of that size
        (CompactLinear(1024, 512, BlockDiagonal(8)), True),
        (CompactLinear(12, 8, Mask(torch.eye(8, 12, dtype=torch.bool))), False),
        (nn.Linear(128, 128), False),
        (nn.Linear(128, 136), True),
    ],
    ids=repr,
)
def test_compiled_solvers_read_small_weights(layer, stays_packed):
    packed = convert(prepare(layer, {"weight": None}))
    x = torch.zeros(64, layer.in_features)  # eager, fewer samples of a small layer are faster on the weight
    if native.kernel() == "torch":
        pytest.skip("without the kernel nothing stays packed")
    compiled = torch.compile(lambda x: x + packed.stays_packed(x), backend="eager", fullgraph=True)
    assert packed.stays_packed(x) and compiled(x).any() == stays_packed


@pytest.mark.parametrize("make", LAYERS)
def test_the_adjoint_of_a_weight_that_is_more_than_its_signs_is_refused(make):
    packed = convert(prepare(make(), {"weight": None}))
    y = torch.randn(3, 6)
    assert packed.adjoint(y).shape == (3, 8)
    parametrize.register_parametrization(packed, "weight", Twice())
    with pytest.raises(PIBiNNError, match=r"multiply by weight\.mT"):
        packed.adjoint(y)


@pytest.mark.parametrize(
    "make", [lambda: OwnLinear(8, 6), lambda: OwnCompactLinear(8, 6, BlockDiagonal(2)), lambda: nn.Bilinear(8, 8, 6)]
)
def test_only_the_very_classes_multiply_their_bits(make):
    model = prepare(nn.Sequential(make()), {"0.weight": None})
    packed = convert(model)
    assert not isinstance(packed[0], PackedLinear | PackedCompactLinear)
    assert isinstance(packed[0], type(model[0]).__bases__[0])
    inputs = (torch.randn(5, 8), torch.randn(5, 8)) if isinstance(packed[0], nn.Bilinear) else (torch.randn(5, 8),)
    torch.testing.assert_close(packed[0](*inputs), model[0](*inputs))


def test_autocast_takes_the_product_into_its_dtype():
    model = prepare(nn.Linear(8, 6), {"weight": None})
    packed, x = convert(model), torch.randn(5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == model(x).dtype == torch.bfloat16


def test_inputs_that_are_no_floating_point_numbers_are_refused():
    packed = convert(prepare(nn.Linear(8, 6), {"weight": None}))
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), pytest.raises(PIBiNNError, match="expected a floating-point tensor"):
            packed(torch.ones(2, 8, dtype=torch.int64))


def test_a_layer_that_stops_multiplying_its_bits_forgets_how_it_did():
    from pibinn_plugin.packed import multiply_bits, stop_multiplying_bits

    packed = convert(prepare(nn.Linear(8, 6), {"weight": None}))
    use_int8_activations(packed)
    assert stop_multiplying_bits(packed)
    assert not stop_multiplying_bits(packed)
    multiply_bits(packed)
    assert packed.int8_activations is False


def test_a_scale_that_the_dtype_of_one_layer_cannot_hold_is_refused():
    """λ in float32, which training has made too small for the layer of half precision: its weight would be 0."""
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).half()), {"*.weight": None})
    convert(model)
    global_scale(model).set(1e-20)
    with pytest.raises(ScaleError, match=r"torch\.float16; got .*, which rounds to 0"):
        convert(model)
    assert global_scale(model)().item() == pytest.approx(1e-20)


@pytest.mark.parametrize("values", [(0.5, 0.25), (0.5, 0.5)])
def test_a_network_of_parts_that_were_prepared_apart_is_refused(values):
    """One λ: also where all have one value, which training would take apart."""
    parts = [prepare(nn.Linear(4, 4), {"weight": None}) for _ in values]
    for part, value in zip(parts, values, strict=True):
        part.pibinn_scale.set(value)
    model = nn.Sequential(*parts)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ScaleError, match=r"(2|several) global scales"):
        convert(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert convert(parts[0]).weight.abs().unique().item() == values[0]
