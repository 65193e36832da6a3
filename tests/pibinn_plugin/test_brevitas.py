"""The scheme through Brevitas' own entry points: layers with ``weight_quant=``, injectors, proxies, ``QuantTensor``."""

import copy
import io

import brevitas.config
import brevitas.nn as qnn
import pytest
import torch
import torch.nn.functional as F
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Int32Bias
from torch import nn

from pibinn_plugin import ScaleError, StructureError, convert, global_scale, prepare
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, CompactLinear
from pibinn_plugin.packed import PackedLinear
from pibinn_plugin.quantizer import GlobalScale, quantize_sign
from pibinn_plugin.schemes.brevitas import (
    PIBiNNWeightQuant,
    QuantBandedLinear,
    QuantBlockDiagonalLinear,
    QuantCompactLinear,
)
from pibinn_plugin.structure import BlockDiagonal, Mask
from pibinn_plugin.workflow import quantized_weights


@pytest.fixture
def ignore_missing_keys(monkeypatch):
    monkeypatch.setattr(brevitas.config, "IGNORE_MISSING_KEYS", True)


def with_scale(scale=0.5, **fields):
    return PIBiNNWeightQuant.let(scaling_impl=GlobalScale(scale), **fields)


LAYERS = {
    "linear": (lambda **q: qnn.QuantLinear(8, 4, **q), BlockDiagonal(2), (3, 8)),
    "conv1d": (lambda **q: qnn.QuantConv1d(4, 6, 3, padding=1, **q), BlockDiagonal(2), (3, 4, 7)),
    "conv2d": (lambda **q: qnn.QuantConv2d(4, 6, 3, stride=2, **q), BlockDiagonal(2), (3, 4, 7, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_trap_masked_weight_is_a_valid_quant_tensor_of_minus_one_zero_one(name):
    """0 is no bipolar value: with a mask and one bit the QuantTensor would be invalid."""
    make, structure, input_shape = LAYERS[name]
    layer = make(weight_quant=with_scale(mask=structure))
    weight = layer.quant_weight()
    assert weight.is_valid
    assert (weight.bit_width.item(), weight.signed, weight.scale.tolist()) == (2.0, True, [0.5])
    assert set(weight.int().unique().tolist()) == {-1, 0, 1}
    expected = quantize_sign(layer.weight, torch.tensor([0.5]), structure.mask(layer.weight.shape))
    assert torch.equal(weight.value, expected)
    assert torch.equal(weight.int() * 0.5, expected)
    functions = {2: F.linear, 3: F.conv1d, 4: F.conv2d}
    arguments = {"conv1d": {"padding": 1}, "conv2d": {"stride": 2}}.get(name, {})
    input = torch.randn(input_shape)
    torch.testing.assert_close(layer(input), functions[expected.dim()](input, expected, layer.bias, **arguments))


@pytest.mark.parametrize(
    "layer",
    [
        qnn.QuantLinear(8, 4, weight_quant=with_scale()),
        QuantBlockDiagonalLinear(8, 4, 2, weight_quant=with_scale()),
        QuantBandedLinear(8, 4, 1, 1, weight_quant=with_scale()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_trap_weight_without_zeros_is_bipolar(layer):
    weight = layer.quant_weight()
    assert weight.is_valid
    assert weight.bit_width.item() == 1.0
    assert set(weight.int().unique().tolist()) == {-1, 1}
    assert torch.equal(weight.value, quantize_sign(layer.weight, torch.tensor([0.5])))


def test_compact_layers_compute_what_the_dense_ones_do():
    quantizer = with_scale()
    for layer in (
        QuantBlockDiagonalLinear(8, 4, 2, weight_quant=quantizer),
        QuantBlockDiagonalLinear(5, 4, BlockDiagonal(rows=(1, 3), columns=(3, 2)), weight_quant=with_scale()),
        QuantBandedLinear(8, 4, 1, 1, bias=False, weight_quant=with_scale()),
    ):
        dense = layer.structure.to_dense(quantize_sign(layer.weight, torch.tensor([0.5])), layer.dense_shape)
        input = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(input), F.linear(input, dense, layer.bias))


def test_layers_of_one_model_share_a_scale_registered_once():
    scale = GlobalScale(0.5)
    model = nn.Sequential(
        qnn.QuantLinear(8, 8, weight_quant=PIBiNNWeightQuant.let(scaling_impl=scale, mask=BlockDiagonal(4))),
        qnn.QuantLinear(8, 8, weight_quant=PIBiNNWeightQuant, weight_scaling_impl=scale, weight_mask=torch.eye(8)),
        QuantBlockDiagonalLinear(8, 8, 2, weight_quant=PIBiNNWeightQuant, weight_scaling_impl=scale),
    )
    assert [p is scale.value for p in model.parameters()].count(True) == 1
    assert [key for key in model.state_dict() if "scaling" in key] == ["0.weight_quant.tensor_quant.scaling_impl.value"]
    assert [w.quantizer.structure for w in quantized_weights(model)] == [
        BlockDiagonal(4),
        Mask(torch.eye(8)),
        BlockDiagonal(2),
    ]
    model(torch.randn(3, 8)).square().sum().backward()
    assert scale.value.grad.abs().item() > 0
    packed = convert(model)
    input = torch.randn(3, 8)
    torch.testing.assert_close(packed(input), model(input))


def test_trap_sharing_a_proxy_is_refused():
    """Brevitas would build it again for both layers: a learned scale is lost and there is one mask for two weights."""
    first = qnn.QuantLinear(8, 8, weight_quant=with_scale())
    with pytest.raises(ScaleError, match="share the GlobalScale"):
        qnn.QuantLinear(8, 8, weight_quant=first.weight_quant)


def test_scale_must_be_a_global_scale_and_the_mask_must_fit():
    with pytest.raises(ScaleError, match="GlobalScale"):
        qnn.QuantLinear(8, 8, weight_quant=PIBiNNWeightQuant.let(scaling_impl=nn.Identity()))
    with pytest.raises(StructureError, match="divisor"):
        qnn.QuantLinear(8, 8, weight_quant=with_scale(mask=BlockDiagonal(3)))


def test_trap_load_after_deepcopy_keeps_the_copys_own_scale():
    """A stock proxy rebuilds its tensor_quant from the injector class at every load: the copy gets the original's λ."""
    for make in (
        lambda: nn.Sequential(qnn.QuantLinear(8, 8, weight_quant=with_scale(mask=BlockDiagonal(4)))),
        lambda: prepare(nn.Sequential(nn.Linear(8, 8)), {"0.weight": BlockDiagonal(4)}, "brevitas"),
    ):
        model = make()
        clone = copy.deepcopy(model)
        clone.load_state_dict(model.state_dict())
        scales = [global_scale(one) for one in (model, clone)]
        assert scales[0] is not scales[1]
        input = torch.randn(3, 8)
        expected = model(input)
        scales[1].set(7.0)
        assert torch.equal(model(input), expected)
        assert clone[0].quant_weight().value.abs().max() == 7.0
        assert next(iter(quantized_weights(clone))).quantizer.scale is scales[1]


def test_trap_reload_does_not_reset_a_trained_scale():
    model = nn.Sequential(qnn.QuantLinear(8, 8, weight_quant=with_scale(0.5)))
    global_scale(model).set(2.0)
    model.load_state_dict({k: v for k, v in model.state_dict().items() if "scaling" not in k}, strict=False)
    assert global_scale(model)().item() == 2.0


@pytest.mark.parametrize("through_workflow", [True, False])
def test_trap_float_checkpoint_loads_with_ignore_missing_keys(through_workflow, ignore_missing_keys):
    torch.manual_seed(1)
    checkpoint = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).state_dict()
    if through_workflow:
        model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), {"*.weight": BlockDiagonal(4)}, "brevitas")
    else:
        scale = GlobalScale(0.5)
        quantizer = PIBiNNWeightQuant.let(scaling_impl=scale, mask=BlockDiagonal(4))
        model = nn.Sequential(
            qnn.QuantLinear(8, 8, weight_quant=quantizer), qnn.QuantLinear(8, 4, weight_quant=quantizer)
        )
    value = global_scale(model)().item()
    result = model.load_state_dict(checkpoint)  # strictly
    assert not result.missing_keys
    assert torch.equal(quantized_weights(model)[0].latent, checkpoint["0.weight"])
    assert global_scale(model)().item() == value
    with pytest.raises(RuntimeError, match=r"0\.weight"):  # what a float checkpoint does hold is not forgiven
        model.load_state_dict({key: value for key, value in checkpoint.items() if key != "0.weight"})


def test_float_checkpoint_is_refused_otherwise():
    model = prepare(nn.Sequential(nn.Linear(8, 8)), {"0.weight": None}, "brevitas")
    with pytest.raises(RuntimeError, match=r"pibinn_scale\.value"):
        model.load_state_dict(nn.Sequential(nn.Linear(8, 8)).state_dict())


def brevitas_model():
    torch.manual_seed(0)
    return nn.Sequential(
        qnn.QuantLinear(
            8,
            8,
            weight_quant=Int8WeightPerTensorFloat,
            input_quant=Int8ActPerTensorFloat,
            output_quant=Int8ActPerTensorFloat,
            bias_quant=Int32Bias,
        ),
        nn.ReLU(),
        qnn.QuantLinear(8, 4, weight_quant=Int8WeightPerTensorFloat),
    )


def test_trap_other_quantizers_of_a_brevitas_layer_stay():
    """Only the weight quantizer is swapped; and the packed layer goes on quantizing its input, bias and output."""
    model = brevitas_model()
    model(torch.randn(64, 8))  # collects the ranges of the activations
    layer, others = model[0], [model[0].input_quant, model[0].output_quant, model[0].bias_quant]
    latent = layer.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare(model, {"*.weight": BlockDiagonal(4)}, "brevitas")
    assert model[0] is layer
    assert [layer.input_quant, layer.output_quant, layer.bias_quant] == others
    assert quantized_weights(model)[0].latent is latent  # the optimizer goes on with it
    assert any(parameter is latent for group in optimizer.param_groups for parameter in group["params"])
    assert set(layer.quant_weight().int().unique().tolist()) == {-1, 0, 1}
    model.eval()
    input = torch.randn(5, 8)
    expected = model(input)
    packed = convert(model)
    torch.testing.assert_close(packed(input), expected)
    assert packed[0].input_quant.is_quant_enabled
    assert packed[0].output_quant.is_quant_enabled
    assert torch.equal(packed[0].weight, layer.quant_weight().value)
    with torch.no_grad():
        without = F.linear(input, layer.quant_weight().value, layer.bias)
    assert not torch.equal(without, packed[0](input))


def test_swapped_float_layers_keep_their_parameters():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), BlockDiagonalLinear(8, 8, 2), BandedLinear(8, 8, 1, 1))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare(model, {"[023].weight": None}, "brevitas")
    for i, kind in ((0, qnn.QuantLinear), (2, QuantCompactLinear), (3, QuantCompactLinear)):
        assert isinstance(model[i], kind)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    before = after["0.weight"].detach().clone()
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(after["0.weight"], before)
    assert isinstance(model[1], nn.BatchNorm1d)  # not merged into a weight whose sign would discard it
    assert isinstance(convert(model)[0], PackedLinear)


def test_trap_state_dict_round_trip_without_pickled_classes():
    """Brevitas models cannot be pickled whole (dynamic classes): the state dict must say everything."""

    def make(seed):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(2, 2, 3, padding=1), nn.Linear(8, 8))
        return prepare(layers, {"0.weight": BlockDiagonal(4), "1.weight": None}, "brevitas")

    source, target, file = make(0), make(1), io.BytesIO()
    global_scale(source).set(0.75)
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    input = torch.randn(2, 8)
    assert torch.equal(target(input), source(input))


def test_quant_tensors_flow_through_a_compact_layer():
    layer = QuantBlockDiagonalLinear(
        8, 4, 2, weight_quant=with_scale(), input_quant=Int8ActPerTensorFloat, output_quant=Int8ActPerTensorFloat,
        return_quant_tensor=True,
    )  # fmt: skip
    layer(torch.randn(64, 8))
    layer.eval()
    input = torch.randn(3, 8)
    output = layer(input)
    assert output.is_valid
    dense = layer.structure.to_dense(layer.quant_weight().value, (4, 8))
    expected = layer.output_quant(F.linear(layer.input_quant(input).value, dense, layer.bias))
    torch.testing.assert_close(output.value, expected.value)


# --------------------------------------------------------------------------------------- Brevitas' own tools on a layer


@pytest.mark.parametrize("compact", [False, True])
def test_calibration_and_bias_correction_see_the_masked_weight(compact):
    """With quantizers off Brevitas reads the weight as it is: V ⊙ M, not V."""
    from brevitas.graph.calibrate import bias_correction_mode, quantization_status_manager

    torch.manual_seed(0)
    make = BlockDiagonalLinear if compact else lambda rows, columns, _: nn.Linear(rows, columns)
    model = prepare(nn.Sequential(make(8, 8, 4)), {"0.weight": BlockDiagonal(4)}, "brevitas").eval()
    (weight,) = quantized_weights(model)
    dense = weight.structure.to_dense(weight.quantizer.structural(weight.latent), (8, 8))
    with torch.no_grad():
        weight.latent.mul_(1.5)  # |V| far from λ, so that the difference shows
        weight.latent.add_(3.0 * (1 - weight.structure.mask((8, 8)).float()) if not compact else 0.0)
    dense = weight.structure.to_dense(weight.quantizer.structural(weight.latent), (8, 8))
    x = torch.randn(64, 8)
    with (
        torch.no_grad(),
        quantization_status_manager(model, disable_weight_quant=True, disable_act_quant=True, disable_bias_quant=True),
    ):
        torch.testing.assert_close(model(x), F.linear(x, dense, model[0].bias))
    before, quantized = model[0].bias.detach().clone(), model(x).detach()
    with torch.no_grad(), bias_correction_mode(model):
        model(x)
    expected = (F.linear(x, dense, before) - quantized).mean(0)
    torch.testing.assert_close(model[0].bias.detach() - before, expected, rtol=1e-3, atol=1e-4)


def test_slices_of_a_masked_weight_are_slices_of_w():
    """As GPTQ takes them, a column at a time."""
    layer = qnn.QuantLinear(8, 4, weight_quant=with_scale(mask=BlockDiagonal(2)))
    for column in range(8):
        part = layer.quant_weight(subtensor_slice_list=[None, (column, column + 1)])
        assert torch.equal(getattr(part, "value", part), layer.weight[:, column : column + 1])


def test_gptq_leaves_a_one_bit_network():
    from brevitas.graph.gptq import gptq_mode

    torch.manual_seed(0)
    model = prepare(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), {"*.weight": BlockDiagonal(4)}, "brevitas"
    )
    model.eval()
    with torch.no_grad(), gptq_mode(model, use_quant_activations=False) as gptq:
        for _ in range(gptq.num_layers):
            gptq.model(torch.randn(64, 8))
            gptq.update()
    value = global_scale(model)().item()
    assert set(model[0].weight.unique().tolist()) == {-value, 0.0, value}
    x = torch.randn(3, 8)
    torch.testing.assert_close(convert(model)(x), model(x))


def test_a_mask_is_never_left_on_the_meta_device():
    """`layerwise_quantize` builds layers on meta when the float ones are there, and loads the weights afterwards."""
    model = nn.Sequential(qnn.QuantLinear(8, 4, device="meta", weight_quant=with_scale(mask=BlockDiagonal(2))))
    source = nn.Sequential(qnn.QuantLinear(8, 4, weight_quant=with_scale(mask=BlockDiagonal(2))))
    model.load_state_dict(source.state_dict(), assign=True)
    model.to("cpu").to(torch.float64)
    assert torch.equal(model[0].weight, source[0].weight.double())


@pytest.mark.parametrize(
    "structure", [BlockDiagonal(2), Mask(torch.eye(8)), BlockDiagonal(rows=(3, 5), columns=(6, 2))]
)
def test_a_compact_layer_gives_quant_tensors_when_asked(structure):
    torch.manual_seed(0)
    compact = QuantCompactLinear(
        8, 8, structure, False, with_scale(), input_quant=Int8ActPerTensorFloat, return_quant_tensor=True
    )
    compact(torch.randn(16, 8))
    compact.eval()
    x = torch.randn(4, 8)
    output = compact(x)
    assert output.is_valid
    dense = structure.to_dense(compact.weight, (8, 8))
    torch.testing.assert_close(output.value, F.linear(compact.input_quant(x).value, dense))
    masked = qnn.QuantLinear(
        8,
        8,
        bias=False,
        weight_quant=PIBiNNWeightQuant.let(scaling_impl=GlobalScale(0.5), mask=structure),
        input_quant=Int8ActPerTensorFloat,
        return_quant_tensor=True,
    )
    assert output.bit_width == masked(x).bit_width  # of a product with -1, 0 and 1


@pytest.mark.parametrize("scheme", ["torchao", "brevitas"])
def test_one_compact_layer_for_every_structure(scheme):
    mask = Mask([[1, 0, 1], [0, 1, 1]])
    layer = CompactLinear(3, 2, mask)
    model = prepare(nn.Sequential(layer), {"0.weight": None}, scheme)
    assert model[0] is layer
    x = torch.randn(4, 3)
    expected = F.linear(x, mask.to_dense(layer.weight, (2, 3)), layer.bias)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(convert(model)(x), expected)
