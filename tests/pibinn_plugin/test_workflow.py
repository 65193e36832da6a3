"""prepare -> freeze_signs -> convert: the same in all three schemes, and the same as `quantizer.py`."""

import copy

import pytest
import torch
from every_layer import SCHEMES, TARGETS, Solver, float_twin, solver, step, weights_by_reference
from torch import nn

from pibinn_plugin import PIBiNNError, ScaleError, StructureError, convert, freeze_signs, global_scale, prepare
from pibinn_plugin.packed import PackedCompactLinear, PackedLinear
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.structure import BlockDiagonal, Dense
from pibinn_plugin.workflow import quantized_weights


@pytest.fixture
def batch():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def test_forward_values_and_gradients_are_bit_identical_between_schemes(batch):
    outputs, gradients, latent_gradients = {}, {}, {}
    for scheme in SCHEMES:
        model = solver(scheme)
        outputs[scheme], gradients[scheme] = step(model, batch)
        latent_gradients[scheme] = {weight.name: weight.latent.grad for weight in quantized_weights(model)}
    for scheme in ("torchao", "brevitas"):
        assert torch.equal(outputs[scheme], outputs["native"])
        assert torch.equal(gradients[scheme], gradients["native"])
        assert latent_gradients[scheme].keys() == latent_gradients["native"].keys() == TARGETS.keys()
        for name, gradient in latent_gradients[scheme].items():
            assert torch.equal(gradient, latent_gradients["native"][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_is_that_of_a_float_model_with_the_reference_weights(scheme, dtype, batch):
    model = solver(scheme, dtype=dtype)
    output = model(batch.to(dtype))
    assert output.dtype == dtype
    assert torch.equal(output, float_twin(model)(batch.to(dtype)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_float_model_passed_straight_through(scheme, batch):
    """dV = λ dW on the structure, and λ gets the sum over all layers of dW · sign(V)."""
    model = solver(scheme, dtype=torch.float64)
    twin = float_twin(model)
    _, scale_gradient = step(model, batch.double())
    twin(batch.double()).square().sum().backward()
    scale, expected = global_scale(model)().item(), torch.zeros((), dtype=torch.float64)
    for weight in quantized_weights(model):
        gradient = twin.get_parameter(weight.name).grad
        mask = 1.0 if weight.quantizer.compact else weight.quantizer.structure.mask(weight.quantizer.shape)
        torch.testing.assert_close(weight.latent.grad, scale * gradient * mask)
        expected += (gradient * mask * torch.where(weight.latent >= 0, 1.0, -1.0)).sum()
    torch.testing.assert_close(scale_gradient, expected.reshape(1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scale_starts_at_the_mean_magnitude_of_all_structural_latents(scheme):
    torch.manual_seed(0)
    model = Solver()
    magnitudes = []
    for name, structure in TARGETS.items():
        parameter = model.get_parameter(name).detach()
        magnitudes.append(parameter[structure.mask(parameter.shape)] if structure else parameter.flatten())
    expected = torch.cat(magnitudes).abs().double().mean().item()
    assert global_scale(prepare(model, TARGETS, scheme))().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_without_a_graph_break(scheme, batch):
    model = solver(scheme)
    expected, gradient = step(model, batch)
    model.zero_grad()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(batch)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(global_scale(model).value.grad, gradient)
    packed = convert(model)
    torch.testing.assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(batch), packed(batch))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_of_another_structure_is_refused(scheme):
    other = solver(scheme, targets={**TARGETS, "masked.weight": BlockDiagonal(2)})
    with pytest.raises(StructureError, match=r"blocks=4.*blocks=2"):
        other.load_state_dict(solver(scheme).state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_freeze_signs_trains_scale_and_float_parameters_only(scheme, batch):
    model = solver(scheme)
    step(model, batch)
    assert freeze_signs(model) is model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    latents = {weight.name: weight.latent.detach().clone() for weight in quantized_weights(model)}
    scale, threshold = global_scale(model).value.item(), model.threshold.item()
    optimizer.step()  # the gradients of the step before are pending: those of the latents must be gone
    optimizer.zero_grad()
    model(batch).square().sum().backward()
    optimizer.step()
    for weight in quantized_weights(model):
        assert torch.equal(weight.latent, latents[weight.name])
        assert not weight.latent.requires_grad
    assert global_scale(model).value.item() != scale
    assert model.threshold.item() != threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_convert_keeps_every_weight_bit_for_bit_and_the_model_as_it_was(scheme, dtype, batch):
    model = solver(scheme, dtype=dtype)
    with torch.no_grad():
        next(iter(quantized_weights(model))).latent[0, 0] = 0.0
        global_scale(model).value.neg_()  # an optimizer went past zero: λ is its magnitude
    before = copy.deepcopy(model.state_dict())
    reference = weights_by_reference(model)
    packed = convert(model)
    for name, weight in reference.items():
        assert torch.equal(packed.get_submodule(name.rpartition(".")[0]).weight, weight), name
    assert global_scale(packed) is not global_scale(model)
    assert isinstance(packed.dense, PackedLinear)
    assert isinstance(packed.compact, PackedCompactLinear)
    assert isinstance(packed.conv, nn.Conv1d)
    assert not any(True for _ in quantized_weights(packed))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if dtype != torch.bfloat16:
        torch.testing.assert_close(packed(batch.to(dtype)), model(batch.to(dtype)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_model_keeps_one_trainable_scale(scheme, batch):
    packed = convert(solver(scheme))
    loss = packed(batch).square().sum()
    loss.backward()
    torch.testing.assert_close(global_scale(packed).value.grad, step(solver(scheme), batch)[1], rtol=1e-5, atol=1e-5)
    state = convert(solver(scheme, 1)).state_dict()
    packed.load_state_dict(state, assign=True)
    torch.testing.assert_close(packed(batch), solver(scheme, 1)(batch))
    clone = copy.deepcopy(packed)
    global_scale(clone).set(3.0)
    assert clone.dense.weight.abs().unique().tolist() == [3.0]
    assert packed.dense.weight.abs().max() < 3.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_convert_refuses_what_is_no_one_bit_network(scheme):
    with pytest.raises(PIBiNNError, match="prepare"):
        convert(Solver())
    with pytest.raises(PIBiNNError, match="prepare"):
        freeze_signs(Solver())
    model = solver(scheme)
    for weight in quantized_weights(model):
        weight.quantizer.enabled = False
    with pytest.raises(PIBiNNError, match="warm-up"):
        convert(model)
    model = solver(scheme)
    with torch.no_grad():
        global_scale(model).value.fill_(float("nan"))
    with pytest.raises(ScaleError, match="nan"):
        convert(model)
    model = solver(scheme)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "dense" in n and "bias" not in n)[0, 0] = float("nan")
    with pytest.raises(StructureError, match="not finite"):
        convert(model)


def test_global_scale_wants_exactly_one():
    with pytest.raises(ScaleError, match="no global scale"):
        global_scale(Solver())
    two = nn.ModuleDict({"a": solver("native"), "b": solver("native", 1)})
    with pytest.raises(ScaleError, match=r"2 global scales \(a.pibinn_scale, b.pibinn_scale\)"):
        global_scale(two)
    model = solver("native")
    model.pibinn_scale = GlobalScale(1.0)
    with pytest.raises(ScaleError, match="does not own"):
        global_scale(model)


def test_unknown_scheme_and_second_call_are_refused():
    with pytest.raises(PIBiNNError, match="native, torchao, brevitas"):
        prepare(Solver(), TARGETS, "int8")
    with pytest.raises(PIBiNNError, match="prepared already"):
        prepare(solver("native"), TARGETS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_disabled_quantizers_give_the_masked_float_model(scheme, batch):
    """The float warm-up: latents as weights, inside the structure."""
    model = solver(scheme)
    for weight in quantized_weights(model):
        weight.quantizer.enabled = False
    twin = Solver()
    latents = {
        weight.name: weight.latent.detach()
        * (1 if weight.quantizer.compact else weight.quantizer.structure.mask(weight.quantizer.shape))
        for weight in quantized_weights(model)
    }
    twin.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in twin.state_dict()} | latents
    )
    torch.testing.assert_close(model(batch), twin(batch))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_model_prepared_on_one_dtype_can_be_cast(scheme, batch):
    model = solver(scheme).double()
    assert global_scale(model)().dtype == torch.float64
    assert torch.equal(model(batch.double()), float_twin(model)(batch.double()))


def test_zero_latents_have_no_scale():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    with pytest.raises(ScaleError, match="mean"):
        prepare(model, {"weight": Dense()})
    assert type(model) is nn.Linear


def test_a_state_dict_of_the_float_warm_up_loads_as_a_float_network():
    def prepared():
        torch.manual_seed(0)
        return prepare(nn.Sequential(nn.Linear(6, 4)), {"0.weight": BlockDiagonal(2)})

    warming, fresh = prepared(), prepared()
    for weight in quantized_weights(warming):
        weight.quantizer.enabled = False
    fresh.load_state_dict(warming.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), warming(x))
    assert not torch.equal(fresh(x), prepared()(x))
    with pytest.raises(PIBiNNError, match="warm-up"):
        convert(fresh)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_frozen_signs_outlive_what_is_written_to_latents(scheme, batch):
    model = freeze_signs(solver(scheme))
    before = model(batch)
    bits = [weight.packed.bits for weight in quantized_weights(model)]
    for weight in quantized_weights(model):
        weight.latent.data.neg_()
    assert torch.equal(model(batch), before)
    for weight, own in zip(quantized_weights(model), bits, strict=True):
        assert torch.equal(weight.packed.bits, own)
    torch.testing.assert_close(convert(model)(batch), before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_dict_says_whether_signs_are_frozen(scheme):
    """Also to a model that is in the other stage."""
    free, frozen = solver(scheme), freeze_signs(solver(scheme))
    states = {is_frozen: copy.deepcopy(model.state_dict()) for is_frozen, model in ((False, free), (True, frozen))}
    for is_frozen in (False, True, False):
        for model in (free, frozen):
            model.load_state_dict(states[is_frozen])
            assert {weight.is_frozen for weight in quantized_weights(model)} == {is_frozen}


@pytest.mark.parametrize("scheme", ["torchao", "brevitas"])
def test_nothing_of_a_scheme_is_left_in_packed_layers(scheme):
    packed, native = (dict(convert(solver(each)).named_modules()) for each in (scheme, "native"))
    assert packed.keys() == native.keys()
    for name, module in packed.items():
        assert type(module).__name__ == type(native[name]).__name__
        assert vars(module).keys() == vars(native[name]).keys()


def test_a_scale_that_one_layer_cannot_hold_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).half())
    with torch.no_grad():
        model[0].weight.fill_(1e-10)
        model[1].weight.zero_()
    with pytest.raises(ScaleError, match=r"torch\.float16; got 5.*e-11, which rounds to 0"):
        prepare(model, {"*.weight": None})
    assert type(model[0]) is nn.Linear and not any(isinstance(module, GlobalScale) for module in model.modules())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_convert_takes_the_scale_as_it_is_read_and_no_other(scheme, batch):
    model = solver(scheme)
    value = global_scale(model).value
    value.data.neg_()  # an optimizer may take it below zero; what is read is its magnitude
    packed = convert(model)
    assert global_scale(packed).value.item() == -value.item() > 0
    torch.testing.assert_close(packed(batch), model(batch))
    value.data.fill_(float("nan"))
    with pytest.raises(ScaleError, match="nan"):
        convert(model)


def test_a_part_of_a_prepared_model_is_converted_with_a_scale_of_its_own(batch):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.solver = Solver()

        def forward(self, y):
            return self.solver(y)

    whole = prepare(Whole(), {f"solver.{name}": structure for name, structure in TARGETS.items()})
    assert "pibinn_scale.value" in whole.state_dict()
    packed = convert(whole.solver)
    assert [name for name in packed.state_dict() if name.endswith("pibinn_scale.value")] == ["pibinn_scale.value"]
    before = packed(batch)
    torch.testing.assert_close(before, whole(batch))
    global_scale(whole).set(7.0)
    assert torch.equal(packed(batch), before)


def test_convert_compares_in_evaluation_mode_and_leaves_the_modes_as_they_were(batch):
    model = prepare(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)), {"0.weight": None})
    model[2].eval()
    convert(model, args=(batch,))  # with dropout, no two outputs would be equal
    assert [module.training for module in model] == [True, True, False]
    model[2].train()
    convert(model, args=(batch,))
    assert int(model[2].num_batches_tracked) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_of_two_modules_is_frozen_in_both(scheme, batch):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    freeze_signs(prepare(model, {"*.weight": None}, scheme))
    before = model(batch)
    quantized_weights(model)[0].latent.data.neg_()
    assert torch.equal(model(batch), before)
