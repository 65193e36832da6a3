"""Swaps into models that nobody here wrote: the forward really uses ±λ, or a clear error says why not.

The reference is the float model itself with its target parameters overwritten by ``λ · sign(V) ⊙ M``.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pibinn_plugin import BlockDiagonal, PIBiNNError, TargetError, convert, global_scale, prepare
from pibinn_plugin.quantizer import quantize_sign
from pibinn_plugin.structure import Dense
from pibinn_plugin.targets import resolve_targets
from pibinn_plugin.workflow import quantized_weights

SCHEMES = ("native", "torchao", "brevitas")


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(4), ResidualBlock(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class RawParameters(nn.Module):
    """How many unrolled networks are written: matrices as parameters, without layers."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(6, 4))
        self.S = nn.ParameterList(torch.randn(6, 6) for _ in range(3))
        self.by_name = nn.ParameterDict({"last": nn.Parameter(torch.randn(2, 6))})

    def forward(self, y):
        x = y @ self.W.T
        for matrix in self.S:
            x = torch.tanh(x @ matrix.T)
        return x @ self.by_name["last"].T


class Scaled(nn.Linear):
    """A subclass that does something of its own with its weight."""

    def forward(self, input):
        return F.linear(input, 2.0 * self.weight, self.bias)


class Recurrent(nn.Module):
    """One module, registered once and called several times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(6, 4)

    def forward(self, x):
        hidden = None
        for _ in range(3):
            hidden = self.cell(x, hidden)
        return hidden[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4))


def transformer():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)


def hooked():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    model[1].register_forward_hook(lambda module, args, output: 3.0 * output)
    return model


def patched():
    """As offloading libraries do: a forward in the instance."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    layer = model[1]
    layer.forward = lambda input: 3.0 * F.linear(input, layer.weight, layer.bias)
    return model


def was_lazy():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4))
    model(torch.zeros(1, 6))
    return model


def quantized_embedding():
    return nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4))


def one_dimensional(*shape):
    return lambda: torch.randn(*shape)


EVERYWHERE = {
    "mlp": (mlp, {"0.weight": None, "3.weight": BlockDiagonal(2)}, one_dimensional(5, 6)),
    "resnet": (ResNet, {"blocks.*.conv?.weight": BlockDiagonal(2), "head.weight": None}, one_dimensional(2, 3, 8, 8)),
    "resnet stem": (ResNet, {"stem.weight": None}, one_dimensional(2, 3, 8, 8)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Conv1d(6, 6, 2, groups=6)),
        {"*.weight": None},
        one_dimensional(2, 4, 9),
    ),
    "sequential of sequentials": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))),
        {"*.weight": None},
        one_dimensional(5, 6),
    ),
    "reused module": (Recurrent, {"layer.weight": BlockDiagonal(3)}, one_dimensional(5, 6)),
    "was lazy": (was_lazy, {"*.weight": None}, one_dimensional(5, 6)),
}
NATIVE_ONLY = {
    "raw parameters": (RawParameters, {"W": None, "S.*": BlockDiagonal(3), "by_name.last": None}, one_dimensional(4)),
    "subclass": (
        lambda: nn.Sequential(Scaled(6, 4), nn.Linear(4, 2)),
        {"0.weight": BlockDiagonal(2)},
        one_dimensional(5, 6),
    ),
    "lstm cell": (Cell, {"cell.weight_*": None}, one_dimensional(2, 6)),
    "attention": (
        Attention,
        {"attention.in_proj_weight": BlockDiagonal(8), "attention.out_proj.weight": None},
        one_dimensional(2, 5, 8),
    ),
    "transformer": (
        transformer,
        {"*.linear?.weight": None, "*.out_proj.weight": BlockDiagonal(2)},
        one_dimensional(2, 5, 8),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2)),
        {"0.weight": BlockDiagonal(2)},
        one_dimensional(2, 4, 5),
    ),
    "embedding": (quantized_embedding, {"0.weight": None}, lambda: torch.arange(10)),
    "bilinear": (lambda: nn.ModuleDict({"b": nn.Bilinear(3, 4, 5)})["b"], {"weight": None}, None),
    "batch norm": (mlp, {"2.weight": None}, one_dimensional(5, 6)),
}


def reference(make, targets):
    """The float model, and a copy whose targets hold ``λ · sign(V) ⊙ M`` as plain numbers."""
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    resolved = [(t.name, t.structure, t.shape) for t in resolve_targets(model, targets)]
    latents = {name: model.get_parameter(name).detach() for name, _, _ in resolved}
    magnitudes = [latents[name][structure.mask(shape)].abs().double() for name, structure, shape in resolved]
    scale = torch.tensor([torch.cat(magnitudes).mean()], dtype=torch.float32)
    with torch.no_grad():
        for name, structure, shape in resolved:
            twin.get_parameter(name).copy_(quantize_sign(latents[name], scale, structure.mask(shape)))
    return model, twin


TORCHAO_TOO = ("subclass", "transformer", "transposed convolution")  # of those that Brevitas has no layers for
CASES = [(scheme, name) for name in EVERYWHERE for scheme in SCHEMES]
CASES += [("native", name) for name in NATIVE_ONLY] + [("torchao", name) for name in TORCHAO_TOO]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("scheme", "name"), CASES)
def test_forward_uses_the_one_bit_weights(scheme, name, training):
    make, targets, draw = (EVERYWHERE | NATIVE_ONLY)[name]
    model, twin = reference(make, targets)
    inputs = (torch.randn(5, 3), torch.randn(5, 4)) if draw is None else (draw(),)
    prepared = prepare(model, targets, scheme).train(training)
    packed = convert(prepared)
    with torch.set_grad_enabled(training):
        expected = twin.train(training)(*inputs)
        torch.testing.assert_close(prepared(*inputs), expected)
        torch.testing.assert_close(packed(*inputs), expected)
    if training:
        prepared(*inputs).square().sum().backward()
        assert global_scale(prepared).value.grad.abs().item() > 0
        assert all(weight.latent.grad is not None for weight in quantized_weights(prepared))
    assert packed.training == training
    assert not {weight.name for weight in quantized_weights(prepared)} & {n for n, _ in packed.named_parameters()}


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(scheme, name) for name in NATIVE_ONLY for scheme in SCHEMES if (scheme, name) not in CASES],
)
def test_what_only_native_can_quantize_is_refused_by_name(scheme, name):
    make, targets, _ = NATIVE_ONLY[name]
    model = make()
    types = [type(module) for module in model.modules()]
    with pytest.raises(TargetError, match=r"scheme=\"native\""):
        prepare(model, targets, scheme)
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize("scheme", SCHEMES)
def test_recurrent_layers_are_refused(scheme):
    """They read their weights from a list made once, past any parametrization or swap."""
    model = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(TargetError, match=r"0\.weight_hh_l0"):
        prepare(model, {"*.weight_hh_l0": None}, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inference_fast_path_of_a_transformer_does_not_bypass_the_quantizers(scheme):
    """In evaluation TransformerEncoderLayer hands ``linear1.weight`` to a fused kernel, past the layer's forward."""
    model, twin = reference(transformer, targets := {"*.linear?.weight": None})
    prepared, input = prepare(model, targets, scheme).eval(), torch.randn(2, 5, 8)
    with torch.inference_mode():
        torch.testing.assert_close(prepared(input), twin.eval()(input))
        torch.testing.assert_close(convert(prepared)(input), twin(input))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_bare_root_layer(scheme):
    """torchao loses a module that is swapped for the root (ao#2640), Brevitas cannot swap it: none is swapped."""
    model, twin = reference(lambda: nn.Linear(6, 4), {"weight": BlockDiagonal(2)})
    prepared = prepare(model, {"weight": BlockDiagonal(2)}, scheme)
    assert prepared is model
    input = torch.randn(3, 6)
    torch.testing.assert_close(prepared(input), twin(input))
    torch.testing.assert_close(convert(prepared)(input), twin(input))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_hooks_are_kept(scheme):
    model, targets = hooked(), {"*.weight": None}
    prepared = prepare(model, targets, scheme)
    weights = {weight.name: weight for weight in quantized_weights(prepared)}
    scale = global_scale(prepared)()
    w0, w1 = (quantize_sign(weights[name].latent, scale) for name in ("0.weight", "1.weight"))
    input = torch.randn(3, 6)
    expected = 3.0 * F.linear(F.linear(input, w0, prepared[0].bias), w1, prepared[1].bias)
    torch.testing.assert_close(prepared(input), expected)
    torch.testing.assert_close(convert(prepared)(input), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_forward_patched_into_an_instance_is_kept_and_never_converted_to_another(scheme):
    model, input = patched(), torch.randn(3, 6)
    prepare(model, {"*.weight": None}, scheme)
    weights = [quantize_sign(weight.latent, global_scale(model)()) for weight in quantized_weights(model)]
    expected = 3.0 * F.linear(F.linear(input, weights[0], model[0].bias), weights[1], model[1].bias)
    torch.testing.assert_close(model(input), expected)
    with pytest.raises(PIBiNNError, match=r"1\.forward is a function that holds '1' of this model"):
        convert(model)


@pytest.mark.parametrize("make", [RawParameters, Cell, lambda: nn.Sequential(Scaled(4, 4))])
def test_convert_leaves_the_trained_model_working(make):
    """A deepcopy of a parametrized module shares its class: undoing the parametrization of the copy breaks both."""
    model = prepare(make(), {"cell.weight_*" if make is Cell else "W" if make is RawParameters else "*.weight": None})
    input = torch.randn(2, 6 if make is Cell else 4)
    expected = model(input)
    convert(model)
    assert torch.equal(model(input), expected)
    model(input).sum().backward()
    torch.testing.assert_close(convert(model)(input), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tied_float_parameters_stay_tied(scheme):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    model = prepare(Model(), {"a.weight": None}, scheme)
    packed = convert(model)
    for one in (model, packed):
        assert one.b.weight is one.c.weight


@pytest.mark.parametrize("scheme", ["native", "torchao"])
def test_prepare_keeps_parameters_and_modules_so_that_an_optimizer_stays_valid(scheme):
    model = mlp()
    modules, parameters = list(model.modules()), {id(parameter) for parameter in model.parameters()}
    prepare(model, {"0.weight": None}, scheme)
    assert [module for module in model.modules() if module in modules] == modules
    assert parameters <= {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_containers_as_roots_do_not_call_the_scale(scheme):
    for root, name in (
        (nn.Sequential(nn.Linear(4, 4)), "0.weight"),
        (nn.ModuleList([nn.Linear(4, 4)]), "0.weight"),
        (nn.ModuleDict({"a": nn.Linear(4, 4)}), "a.weight"),
    ):
        children = len(root)
        prepare(root, {name: Dense()}, scheme)
        assert len(root) == children
        assert global_scale(root) is next(iter(quantized_weights(root))).quantizer.scale
        assert global_scale(convert(root)).value.shape == (1,)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluation_and_training_modes_survive(scheme):
    model = mlp().eval()
    prepare(model, {"[03].weight": None}, scheme)
    assert not any(module.training for name, module in model.named_modules() if name in ("", "0", "1", "2", "3"))
    assert not convert(model)[0].training


@pytest.mark.parametrize("scheme", SCHEMES)
def test_frozen_weights_stay_frozen(scheme):
    model = mlp()
    model[0].weight.requires_grad_(False)
    prepare(model, {"0.weight": None, "3.weight": None}, scheme)
    frozen = {weight.name: weight.latent.requires_grad for weight in quantized_weights(model)}
    assert frozen == {"0.weight": False, "3.weight": True}
