"""The scheme through torchao's own entry points: ``quantize_``, ``FqnToConfig``, ``QATConfig``."""

import json

import pytest
import torch
import torch.nn.functional as F
from fresh_process import run_code
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, quantize_
from torchao.quantization.qat import FakeQuantizedLinear, QATConfig
from torchao.quantization.qat.linear import disable_linear_fake_quant, enable_linear_fake_quant

from pibinn_plugin import (
    PIBiNNError,
    ScaleError,
    StructureError,
    TargetError,
    convert,
    global_scale,
    load,
    save,
    summary,
)
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, CompactLinear
from pibinn_plugin.quantizer import GlobalScale, quantize_sign
from pibinn_plugin.schemes.torchao import PIBiNNQATConfig, PIBiNNTensor, PIBiNNWeightOnlyConfig
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask
from pibinn_plugin.workflow import quantized_weights

BLOCKS = BlockDiagonal(4)
UNEVEN = BlockDiagonal(rows=(2, 6), columns=(5, 3))
EYE = Mask(torch.eye(8) + torch.eye(8).roll(1, 0))

PERMUTED = BlockDiagonal(2, row_order=(3, 1, 0, 2, 7, 6, 5, 4), column_order=(7, 0, 1, 6, 2, 5, 3, 4))


def float_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)))


def trained(structure=BLOCKS):
    model = float_model()
    quantize_(model, PIBiNNQATConfig(structure))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    return model


def packed_model():
    model = trained()
    quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    return model


@pytest.fixture
def batch():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_quantize_prepares_all_layers_with_one_scale(batch):
    model = float_model()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "weight" in name}
    quantize_(model, PIBiNNQATConfig(BlockDiagonal(4)))
    assert sum(isinstance(module, GlobalScale) for module in model.modules()) == 1
    scale = global_scale(model)
    structural = torch.cat([BlockDiagonal(4).to_compact(weight).flatten() for weight in weights.values()])
    assert scale().item() == pytest.approx(structural.abs().double().mean().item(), rel=1e-6)
    w = [quantize_sign(weight, scale(), BlockDiagonal(4).mask(weight.shape)) for weight in weights.values()]
    hidden = F.linear(F.relu(F.linear(batch, w[0], model[0].bias)), w[1])
    assert torch.equal(model(batch), F.linear(hidden, w[2], model[2][1].bias))
    assert isinstance(model[0], FakeQuantizedLinear)
    assert model[0].weight_fake_quantizer.config == PIBiNNQATConfig(BlockDiagonal(4))


def test_trap_several_configs_of_an_fqn_to_config_share_one_scale(batch):
    model = float_model()
    scale = GlobalScale()
    configs = {
        "0": PIBiNNQATConfig(UNEVEN, scale),
        "2.0": PIBiNNQATConfig(EYE, scale),
        "2.1": PIBiNNQATConfig(None, scale),
    }
    quantize_(model, FqnToConfig(configs), filter_fn=None)
    assert [weight.structure for weight in quantized_weights(model)] == [UNEVEN, EYE, Dense()]
    assert global_scale(model) is scale
    assert sum(isinstance(module, GlobalScale) for module in model.modules()) == 1
    structural = torch.cat([w.quantizer.structural(w.latent).flatten() for w in quantized_weights(model)])
    assert global_scale(model)().item() == pytest.approx(structural.abs().double().mean().item(), rel=1e-6)
    expected = model(batch)
    quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    assert len({parameter.scale.data_ptr() for parameter in model.parameters() if hasattr(parameter, "scale")}) == 1
    torch.testing.assert_close(model(batch), expected)


def test_trap_a_config_reused_after_training_leaves_the_trained_network_alone(batch):
    config, trained, other = PIBiNNQATConfig(BlockDiagonal(4)), float_model(0), float_model(1)
    quantize_(trained, config)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    trained(batch).square().mean().backward()
    optimizer.step()
    expected = trained(batch)
    quantize_(other, config)
    assert torch.equal(trained(batch), expected)
    assert global_scale(other) is not global_scale(trained)
    global_scale(other).set(9.0)
    assert torch.equal(trained(batch), expected)


def test_trap_a_config_that_two_networks_share_is_noticed():
    """A handler meets layers, not models: it cannot know that the second network is another one."""
    config, one, other = PIBiNNQATConfig(BlockDiagonal(4)), float_model(0), float_model(1)
    quantize_(one, config)
    quantize_(other, config)
    with pytest.raises(ScaleError, match="no global scale"):
        global_scale(other)


@pytest.mark.parametrize("together", [True, False])
def test_trap_quantize_called_on_each_layer(together, batch, tmp_path):
    """As Hugging Face's ``TorchAoConfig`` does: one λ with one config, several with several, and never in silence."""
    model, config = float_model(), PIBiNNQATConfig(BlockDiagonal(4))
    for layer in (model[0], model[2][0], model[2][1]):
        quantize_(layer, config if together else PIBiNNQATConfig(BlockDiagonal(4)))
    assert summary(model).scale_bytes == (4 if together else 12)
    if together:
        assert global_scale(model).value.numel() == 1
        expected = model(batch)
        quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
        torch.testing.assert_close(load(save(model, tmp_path / "net"), into=float_model(1))(batch), expected)
        return
    for call in (global_scale, convert):
        with pytest.raises(ScaleError, match="3 global scales"):
            call(model)
    quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    assert summary(model).scale_bytes == 12
    with pytest.raises(ScaleError, match="3 global scales"):
        save(model, tmp_path / "net")


def test_trap_qat_config_convert_packs_bit_for_bit(batch):
    """torchao calls ``to_linear`` and then the handler of the base config: λ · sign · M must be folded in."""
    model = trained()
    model.eval()
    expected, scale = model(batch), global_scale(model)()
    weights = [w.quantizer(w.latent).detach() for w in quantized_weights(model)]
    quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    layers = [model[0], model[2][0], model[2][1]]
    for layer, weight in zip(layers, weights, strict=True):
        assert type(layer) is nn.Linear
        assert isinstance(layer.weight, PIBiNNTensor)
        assert torch.equal(layer.weight.dequantize(), weight)
        assert layer.weight.packed_signs.structure == BlockDiagonal(4)
        assert torch.equal(layer.weight.scale, scale)
    torch.testing.assert_close(model(batch), expected)


def test_trap_int1_would_store_a_byte_a_weight():
    """torchao's int1 holds {-1, 0} and a byte for each: here it is one bit for each structural nonzero."""
    weight = packed_model()[0].weight
    assert weight.bits.dtype == torch.uint8
    assert weight.bits.numel() == BlockDiagonal(4).nnz((8, 8)) // 8 == 2
    assert weight.dequantize().unique().numel() == 3


def test_trap_stock_qat_prepare_knows_no_third_party_config():
    with pytest.raises((ValueError, NotImplementedError)):
        quantize_(float_model(), QATConfig(PIBiNNWeightOnlyConfig(), step="prepare"))


def test_trap_bare_root_layer_is_changed_in_place(batch):
    """A module that is swapped for the root is silently lost (ao#2640)."""
    layer = nn.Linear(8, 4)
    weight = layer.weight.detach().clone()
    quantize_(layer, PIBiNNQATConfig(BlockDiagonal(2)))
    expected = F.linear(batch, quantize_sign(weight, global_scale(layer)(), BlockDiagonal(2).mask((4, 8))), layer.bias)
    assert torch.equal(layer(batch), expected)
    quantize_(layer, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    assert isinstance(layer.weight, PIBiNNTensor)
    torch.testing.assert_close(layer(batch), expected)


def test_post_training_quantization_of_a_float_model(batch):
    model, twin = float_model(), float_model()
    quantize_(model, PIBiNNWeightOnlyConfig(BlockDiagonal(4)))
    layers = [twin[0], twin[2][0], twin[2][1]]
    structural = torch.cat([BlockDiagonal(4).to_compact(layer.weight.detach()).flatten() for layer in layers])
    scale = model[0].weight.scale
    torch.testing.assert_close(scale, structural.abs().mean().reshape(1))
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(quantize_sign(layer.weight, scale, BlockDiagonal(4).mask(layer.weight.shape)))
    torch.testing.assert_close(model(batch), twin(batch))
    quantize_(model, PIBiNNWeightOnlyConfig(BlockDiagonal(4)))  # again: nothing is left to do
    torch.testing.assert_close(model(batch), twin(batch))


def test_post_training_quantization_of_layers_with_a_single_magnitude():
    """A layer of one weight has one magnitude; that alone does not make it a trained one with a λ of its own."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 4))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0], [0.5], [0.5]]))
    quantize_(model, PIBiNNWeightOnlyConfig())
    assert model[0].weight.scale.item() == model[1].weight.scale.item() == pytest.approx(1.0)


def test_layers_with_another_scale_do_not_join_a_trained_network_in_silence(tmp_path):
    model = packed_model()
    before = model[0].weight.scale.clone()
    with_float_layer = nn.Sequential(model, nn.Linear(4, 4))
    quantize_(with_float_layer, PIBiNNWeightOnlyConfig())
    assert torch.equal(model[0].weight.scale, before)
    assert summary(with_float_layer).scale_bytes == 8
    with pytest.raises(ScaleError, match="2 global scales"):
        save(with_float_layer, tmp_path / "net")


def test_post_training_quantization_in_two_calls_of_one_config_has_one_scale():
    model, once, config = float_model(), float_model(), PIBiNNWeightOnlyConfig()
    quantize_(once, PIBiNNWeightOnlyConfig())
    quantize_(model, config, lambda module, name: name in ("0", "2.0"))
    quantize_(model, config)
    for one in (model, once):
        assert one[0].weight.scale.item() == one[2][0].weight.scale.item() == one[2][1].weight.scale.item()
    torch.testing.assert_close(model[0].weight.scale, once[0].weight.scale)


def test_a_trained_weight_that_was_changed_before_it_is_packed_is_refused():
    model = trained()
    quantize_(model, QATConfig(step="convert"))  # float layers of λ · sign(V) ⊙ M
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(PIBiNNError, match="changed since"):
        quantize_(model, PIBiNNWeightOnlyConfig())


@pytest.mark.parametrize("mode", [True, False])
def test_training_and_evaluation_modes_survive(mode):
    model = float_model().train(mode)
    quantize_(model, PIBiNNQATConfig())
    assert {module.training for module in model.modules()} == {mode}
    quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    assert {module.training for module in model.modules()} == {mode}


def test_refusals_of_the_handlers():
    model = float_model()
    with pytest.raises(StructureError, match="divisor"):
        quantize_(model, PIBiNNQATConfig(BlockDiagonal(3)))
    with pytest.raises(StructureError, match="expected a Structure"):
        PIBiNNQATConfig(8)
    prepared = trained()
    with pytest.raises(PIBiNNError, match="QATConfig"):
        quantize_(prepared, PIBiNNWeightOnlyConfig())
    with pytest.raises(StructureError, match="trained with"):
        quantize_(prepared, QATConfig(PIBiNNWeightOnlyConfig(Dense()), step="convert"))
    for config in (PIBiNNQATConfig(), PIBiNNWeightOnlyConfig()):
        with pytest.raises(TargetError, match="ReLU"):
            quantize_(nn.Sequential(nn.ReLU()), config, filter_fn=lambda module, name: isinstance(module, nn.ReLU))
    with pytest.raises(StructureError, match="prepared with"):
        quantize_(prepared, PIBiNNQATConfig(Dense()))


def test_convolutions_and_compact_layers():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), BlockDiagonalLinear(24, 8, 4), BandedLinear(8, 8, 1, 1))
    layers = (nn.Conv1d, CompactLinear)
    quantize_(model, PIBiNNQATConfig(), lambda module, name: isinstance(module, layers))
    input = torch.randn(2, 4, 8)
    expected = model(input)
    assert {w.name for w in quantized_weights(model)} == {"0.weight", "2.weight", "3.weight"}
    torch.testing.assert_close(convert(model)(input), expected)
    convolution = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    quantize_(convolution, PIBiNNWeightOnlyConfig(BlockDiagonal(2)), lambda module, name: name == "0")
    dense = F.conv2d(torch.ones(1, 4, 5, 5), convolution[0].weight.dequantize(), convolution[0].bias, padding=1)
    torch.testing.assert_close(convolution(torch.ones(1, 4, 5, 5)), dense)


@pytest.mark.parametrize("structure", [None, Dense(), BlockDiagonal(4), UNEVEN, Banded(1, 2), EYE])
@pytest.mark.parametrize("kind", [PIBiNNQATConfig, PIBiNNWeightOnlyConfig])
def test_trap_configs_round_trip_through_json(kind, structure):
    """torchao looks names up in allowed modules only, skips ``_``-prefixed attributes and raises on tuples."""
    config = kind(structure)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert type(again) is kind
    assert again == config
    assert again.structure == structure
    assert again != kind(Banded(0, 0))
    whole = FqnToConfig({"0": config, "2.0": kind()})
    again = config_from_dict(json.loads(json.dumps(config_to_dict(whole))))
    assert again.fqn_to_config["0"].structure == structure


def test_fake_quantization_is_switched_by_torchaos_own_functions(batch):
    model = trained(None)
    quantized = model(batch)
    model.apply(disable_linear_fake_quant)
    float_output = model(batch)
    latents = [weight.latent for weight in quantized_weights(model)]
    hidden = F.linear(F.relu(F.linear(batch, latents[0], model[0].bias)), latents[1])
    torch.testing.assert_close(float_output, F.linear(hidden, latents[2], model[2][1].bias))
    model.apply(enable_linear_fake_quant)
    assert torch.equal(model(batch), quantized)


def test_trap_import_prints_nothing():
    result = run_code("import pibinn_plugin.schemes.torchao")
    assert (result.stdout, result.stderr) == ("", "")


def test_trap_filter_lets_other_messages_through(caplog):
    """Only the known noise is held back, and only during the import."""
    import logging

    from pibinn_plugin.schemes.quiet_import import quiet_import

    logger = logging.getLogger("torchao")
    with quiet_import():
        logger.warning("Failed to load a kernel")
        logger.warning("something that matters")
    logger.warning("Failed to load after the import")
    assert [record.getMessage() for record in caplog.records] == [
        "something that matters",
        "Failed to load after the import",
    ]
