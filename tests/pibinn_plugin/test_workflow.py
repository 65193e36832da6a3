"""prepare -> freeze_signs -> convert: the same in all three schemes, and the same as `quantizer.py`."""

import copy
import pickle
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from pibinn_plugin import PIBiNNError, ScaleError, StructureError, convert, freeze_signs, global_scale, prepare
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, PackedConv, PackedLinear
from pibinn_plugin.quantizer import GlobalScale, quantize_sign
from pibinn_plugin.structure import BlockDiagonal, Dense, Mask
from pibinn_plugin.workflow import quantized_weights

SCHEMES = ("native", "torchao", "brevitas")
TARGETS = {
    "dense.weight": None,
    "masked.weight": BlockDiagonal(4),
    "compact.weight": None,
    "banded.weight": None,
    "conv.weight": BlockDiagonal(2),
    "any.weight": Mask(torch.eye(8).roll(1, 0) + torch.eye(8)),
}


class Solver(nn.Module):
    """Every kind of layer that all three schemes take, and float parameters between them."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 8)
        self.masked = nn.Linear(8, 8, bias=False)
        self.compact = BlockDiagonalLinear(8, 8, 4)
        self.banded = BandedLinear(8, 8, 1, 1, bias=False)
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.any = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.threshold = nn.Parameter(torch.tensor(0.1))

    def forward(self, y):
        x = F.softshrink(self.masked(self.dense(y)), 0.0) - self.threshold
        x = self.norm(self.banded(torch.tanh(self.compact(x))))
        return self.any(self.conv(x.unflatten(-1, (2, 4))).flatten(-2))


def solver(scheme, seed=0, dtype=torch.float32, targets=TARGETS):
    torch.manual_seed(seed)
    return prepare(Solver().to(dtype), targets, scheme)


def weights_by_reference(model):
    """By `quantizer.py`'s pure function, from the latents alone."""
    scale = next(module for module in model.modules() if isinstance(module, GlobalScale))()
    weights = {}
    for weight in quantized_weights(model):
        quantizer = weight.quantizer
        mask = None if quantizer.compact else quantizer.structure.mask(quantizer.shape)
        weights[weight.name] = quantize_sign(weight.latent, scale, mask)
    return weights


def float_twin(model):
    """A fresh float model that holds the weights ±λ of the prepared one as plain parameters."""
    twin = Solver().to(next(iter(model.parameters())).dtype)
    state = {name: value for name, value in model.state_dict().items() if name in twin.state_dict()}
    state |= {name: value.detach() for name, value in weights_by_reference(model).items()}
    twin.load_state_dict(state)
    return twin


def step(model, batch):
    model.zero_grad()
    output = model(batch)
    output.square().sum().backward()
    return output.detach(), global_scale(model).value.grad.clone()


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
def test_trap_one_scale_in_parameters_and_in_the_state_dict(scheme):
    model = solver(scheme)
    scale = global_scale(model)
    assert [name for name, parameter in model.named_parameters() if parameter is scale.value] == ["pibinn_scale.value"]
    duplicates = [name for name, p in model.named_parameters(remove_duplicate=False) if p is scale.value]
    assert duplicates == ["pibinn_scale.value"]
    assert [key for key in model.state_dict() if "scal" in key] == ["pibinn_scale.value"]
    assert scale.value.shape == (1,)
    assert all(weight.quantizer.scale is scale for weight in quantized_weights(model))


def share_one_scale(model):
    """Every layer must answer to the λ of the root, with its full gradient."""
    scale = global_scale(model)
    with torch.no_grad():
        scale.value.fill_(0.625)
    for name, weight in weights_by_reference(model).items():
        assert set(weight.detach().abs().unique().tolist()) <= {0.0, 0.625}, name
    assert len(list(quantized_weights(model))) == len(TARGETS)
    return all(weight.quantizer.scale is scale for weight in quantized_weights(model))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_deepcopy_shares_one_scale_of_its_own(scheme, batch):
    model = solver(scheme)
    clone = copy.deepcopy(model)
    expected = model(batch)
    assert share_one_scale(clone)
    assert not torch.equal(clone(batch), expected)
    assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_two_models_never_share_a_scale(scheme, batch):
    one, other = solver(scheme, 0), solver(scheme, 1)
    expected = other(batch)
    with torch.no_grad():
        global_scale(one).value.fill_(7.0)
    assert torch.equal(other(batch), expected)
    one.load_state_dict(other.state_dict())
    with torch.no_grad():
        global_scale(one).value.fill_(7.0)
    assert torch.equal(other(batch), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_load_state_dict_also_with_assign_keeps_one_scale(scheme, assign, batch):
    source, target = solver(scheme, 0), solver(scheme, 1)
    keys = target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert torch.equal(target(batch), source(batch))
    _, gradient = step(target, batch)
    assert torch.equal(gradient, step(source, batch)[1])
    assert share_one_scale(target)


@pytest.mark.parametrize("load_with_assign", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_meta_device_then_load_keeps_scale_and_masks(scheme, load_with_assign, batch):
    source = solver(scheme)
    with torch.device("meta"):
        target = Solver()
    prepare(target, TARGETS, scheme)
    if load_with_assign:
        target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    else:
        target.to_empty(device="cpu")
        target.load_state_dict(source.state_dict())
    assert torch.equal(target(batch), source(batch))
    assert torch.equal(step(target, batch)[1], step(source, batch)[1])
    assert share_one_scale(target)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_functional_call_replaces_the_scale_everywhere_and_leaks_nothing(scheme, batch):
    """A module registered in each layer would leak the replaced λ into the model (pytorch#164759)."""
    model = solver(scheme)
    before = model(batch)
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    parameters["pibinn_scale.value"] = torch.tensor([0.625])
    replaced = functional_call(model, parameters, (batch,))
    assert torch.equal(model(batch), before)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        global_scale(changed).value.fill_(0.625)
    assert torch.equal(replaced, changed(batch))
    gradient = torch.func.grad(lambda p: functional_call(model, p, (batch,)).square().sum())(
        {name: value.detach() for name, value in model.named_parameters()}
    )
    torch.testing.assert_close(gradient["pibinn_scale.value"], step(model, batch)[1])


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
    assert [type(module) for module in (packed.dense, packed.compact, packed.conv)] == [
        PackedLinear,
        PackedLinear,
        PackedConv,
    ]
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
        model.get_parameter(next(n for n, _ in model.named_parameters() if "dense" in n and "bias" not in n))[0, 0] = (
            float("nan")
        )
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


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_distributed_training_sees_one_scale_also_in_float_warm_up(scheme, batch):
    """DDP waits for a gradient of every parameter: λ has one, of zero, while the quantizers are off."""
    expected = step(solver(scheme), batch)[1]
    store, limit = torch.distributed.HashStore(), timedelta(seconds=30)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=limit)
    try:
        model = solver(scheme)
        parallel = nn.parallel.DistributedDataParallel(model)
        for enabled in (False, True):
            for weight in quantized_weights(model):
                weight.quantizer.enabled = enabled
            for _ in range(2):  # the second forward raises where a parameter got no gradient in the first
                model.zero_grad()
                parallel(batch).square().sum().backward()
            assert torch.equal(global_scale(model).value.grad, expected if enabled else torch.zeros(1))
    finally:
        torch.distributed.destroy_process_group()


def test_trap_packed_model_can_be_put_into_shared_memory(batch):
    """On torchao's tensor subclasses ``share_memory`` ends the process; `convert` makes plain modules in any scheme."""
    packed = convert(solver("torchao"))
    expected = packed(batch)
    assert torch.equal(packed.share_memory()(batch), expected)
    assert packed.dense.bits.is_shared()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_swap_module_params_keeps_one_scale(scheme, batch):
    """With this switch a conversion swaps the contents of parameters instead of replacing ``.data``."""
    model = solver(scheme)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.load_state_dict(solver(scheme, 1).double().state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(model(batch.double()), solver(scheme, 1).double()(batch.double()))
    assert share_one_scale(model)


def test_trap_pickle_keeps_one_scale(batch):
    """Where the framework can be pickled at all: torch refuses parametrized modules, Brevitas has dynamic classes."""
    model = solver("torchao")
    for one in (model, convert(model)):
        clone = pickle.loads(pickle.dumps(one))
        assert torch.equal(clone(batch), one(batch))
        before = one(batch)
        global_scale(clone).set(0.625)
        assert clone.dense.weight.shape == one.dense.weight.shape
        assert not torch.equal(clone(batch), before)
        assert torch.equal(one(batch), before)
    assert share_one_scale(pickle.loads(pickle.dumps(model)))


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
