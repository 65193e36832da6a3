"""The packed network is the trained network, in networks that hold and read their layers in other ways than ours."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from foreign_networks import NETWORKS, KeepsOutput, PlainList, SharedBlock, TiedParameter, UsesSubclass
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.quantizer import quantize_sign
from pibinn_plugin.schemes import SCHEMES
from pibinn_plugin.weights import one_bit_weights, quantized_weights

MATRICES = {"*weight": None}


@pytest.fixture
def batch():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def made(network, seed=0):
    torch.manual_seed(seed)
    return network()


def by_hand(network):
    """The float network with ``λ · sign`` of all its matrices together as their values."""
    model = made(network)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    scale = torch.cat([p.detach().flatten() for p in matrices]).abs().double().mean().float().reshape(1)
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(quantize_sign(matrix, scale))
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_whole_chain_computes_the_network_written_by_hand(network, scheme, batch, tmp_path):
    model = pb.prepare(made(network), MATRICES, scheme)
    expected = by_hand(network)(batch)
    assert torch.equal(model(batch), expected)
    packed = pb.convert(model, args=(batch,))
    path = pb.save(packed, tmp_path / "net.safetensors")
    fresh, prepared = made(network, 1), pb.prepare(made(network, 2), MATRICES, scheme)
    again = pb.convert(pb.prepare(made(network, 3), MATRICES, scheme))
    again.load_state_dict(packed.state_dict())
    for other in (packed, pb.load(path, fresh), pb.load(path, prepared), pb.load(path, again), again):
        torch.testing.assert_close(other(batch), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_object_stays(network, scheme, tmp_path):
    model = made(network)
    modules, parameters = list(model.modules()), {id(parameter) for parameter in model.parameters()}
    pb.prepare(model, MATRICES, scheme)
    ours = {id(module) for module in modules}
    assert [module for module in model.modules() if id(module) in ours] == modules
    assert parameters < {id(parameter) for parameter in model.parameters()}
    path = pb.save(pb.convert(model), tmp_path / "net.safetensors")
    for other in (made(network, 1), model):
        held = {name: id(module) for name, module in other.named_modules() if "parametrizations" not in name}
        pb.load(path, into=other)
        after = {name: id(module) for name, module in other.named_modules()}
        assert {name: after[name] for name in held if name in after and "quant" not in name} == {
            name: identity for name, identity in held.items() if name in after and "quant" not in name
        }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("network", [SharedBlock, TiedParameter])
def test_a_shared_weight_is_trained_counted_and_stored_once(network, scheme, batch, tmp_path):
    model = pb.prepare(made(network), MATRICES, scheme)
    count = len({id(parameter) for parameter in made(network).parameters() if parameter.dim() == 2})
    weights = quantized_weights(model)
    assert len(weights) == count
    assert pb.summary(model).nnz == 64 * count
    model(batch).square().sum().backward()
    twin = by_hand(network)
    twin(batch).square().sum().backward()
    reference = {id(p): p for p in twin.parameters() if p.dim() == 2}.values()
    for weight, matrix in zip(weights, reference, strict=True):
        torch.testing.assert_close(weight.latent.grad, matrix.grad * pb.global_scale(model)().item())
    path = pb.save(pb.convert(model), tmp_path / "net.safetensors")
    loaded = pb.load(path, into=made(network, 1))
    assert len(one_bit_weights(loaded)) == count
    with torch.no_grad():
        one_bit_weights(loaded)[0].tensor.zero_()  # all -1
    values = {place.name: place.module.weight.unique().numel() for place in one_bit_weights(loaded)[0].places}
    assert len(values) > 1
    assert set(values.values()) == {1}


def test_shared_float_tensors_are_stored_once_and_come_back_tied(tmp_path):
    def network():
        return nn.Sequential(nn.Linear(8, 8), *[nn.PReLU(10_000)] * 10)

    model = pb.prepare(network(), {"0.weight": None})
    path = pb.save(pb.convert(model), tmp_path / "net.safetensors")
    assert path.stat().st_size < 45_000
    with torch.device("meta"):
        on_meta = network()
    for into in (network(), on_meta):
        loaded = pb.load(path, into=into)
        assert loaded[1].weight is loaded[10].weight
        assert torch.equal(loaded[1].weight, model[1].weight)


def test_a_file_of_untied_weights_is_refused_by_a_tied_network(tmp_path):
    untied = nn.ModuleDict({"encoder": nn.Linear(8, 8), "decoder": nn.Linear(8, 8)})
    path = pb.save(pb.convert(pb.prepare(untied, MATRICES)), tmp_path / "net.safetensors")
    with pytest.raises(pb.ArtifactError, match=r"decoder\.weight"):
        pb.load(path, into=TiedParameter())


# ---------------------------------------------------------------------------------------------- changed after prepare


def halved(model):
    torch.nn.utils.parametrizations.spectral_norm(model.a)


def patched(model):
    forward = model.a.forward
    model.a.forward = lambda x: 2 * forward(x)


def rebound(model):
    model.a.forward = functools.partial(doubled, model.a.forward)


def doubled(forward, x):
    return 2 * forward(x)


def hooked(model):
    model.a.register_forward_hook(lambda module, args, output: 3 * output)
    model.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hooked_with_the_model(model):
    model.a.register_forward_hook(lambda module, args, output: output + model.b.bias)


def old_weight_norm(model):
    torch.nn.utils.weight_norm(model.a)


def old_spectral_norm(model):
    torch.nn.utils.spectral_norm(model.a)


def pruned(model):
    torch.nn.utils.prune.l1_unstructured(model.a, "weight", 0.5)


def assigned(model):
    model.a.weight = nn.Parameter(torch.randn(8, 8))


def deleted(model):
    del model.a.weight
    model.a.weight = nn.Parameter(torch.randn(8, 8))


CHANGES = (halved, patched, rebound, hooked, hooked_with_the_model, old_weight_norm, old_spectral_norm)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("change", [*CHANGES, pruned, assigned, deleted])
def test_what_is_done_after_prepare_is_carried_over_or_refused(change, scheme, batch, tmp_path):
    model = pb.prepare(made(PlainList), MATRICES, scheme)
    try:
        change(model)
    except (pb.PIBiNNError, KeyError, TypeError, AttributeError):
        return  # refused by the change itself, ours or torch's
    model.eval()
    expected = model(batch)
    try:
        packed = pb.convert(model)
    except pb.PIBiNNError:
        return
    torch.testing.assert_close(packed(batch), expected, rtol=1e-5, atol=1e-5)
    pb.export(model, tmp_path / "net.pt2", args=(batch,), format="pt2")  # compared with the trained model


@pytest.mark.parametrize("targets", [{"0.bias": None}, {"0.weight": pb.BlockDiagonal(2), "0.bias": None}])
def test_a_bias_that_is_named_is_packed_too(targets, batch, tmp_path):
    model = pb.prepare(nn.Sequential(nn.Linear(8, 8)), targets)
    packed = pb.convert(model, args=(batch,))
    assert [weight.name for weight in one_bit_weights(packed)] == list(targets)
    loaded = pb.load(pb.save(packed, tmp_path / "net.safetensors"), into=nn.Sequential(nn.Linear(8, 8)))
    if "0.weight" in targets:
        torch.testing.assert_close(loaded(batch), model(batch))
    assert torch.equal(loaded[0].bias, model[0].bias)
    pb.export(model, tmp_path / "net.pt2", args=(batch,), format="pt2")


def test_a_norm_on_a_weight_of_blocks_is_exported_with_it(batch, tmp_path):
    """Blocks are written as blocks only where nothing else reads the weight: the norm needs it dense."""
    model = pb.prepare(nn.Sequential(nn.Linear(8, 8)), {"0.weight": pb.BlockDiagonal(2)})
    torch.nn.utils.parametrizations.spectral_norm(model[0])
    model.eval()
    torch.testing.assert_close(pb.convert(model)(batch), model(batch))
    pb.export(model, tmp_path / "net.pt2", args=(batch,), format="pt2")  # compared with the trained model


@pytest.mark.parametrize("scheme", ["native", "torchao"])
def test_a_fused_batch_norm_is_refused_and_not_rounded_to_signs(scheme):
    model = pb.prepare(nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)).eval(), {"0.weight": None}, scheme)
    with pytest.raises(pb.PIBiNNError, match="BatchNorm"):
        torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])


def test_brevitas_merging_of_batch_norm_is_refused():
    from brevitas.nn.utils import merge_bn

    model = pb.prepare(nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)).eval(), {"0.weight": None}, "brevitas")
    with pytest.raises(pb.PIBiNNError, match="BatchNorm"):
        merge_bn(model[0], model[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_output_that_a_module_keeps_is_copied_without_its_graph(scheme, batch):
    model = pb.prepare(made(KeepsOutput), MATRICES, scheme)
    model(batch).sum().backward()
    packed = pb.convert(model)
    torch.testing.assert_close(packed(batch), model(batch))


# ------------------------------------------------------------------------------------------------ wrapped and compiled


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compiled_model_is_the_model_inside(scheme, batch, tmp_path):
    compiled = torch.compile(made(PlainList), backend="eager")
    compiled(batch)
    assert pb.prepare(compiled, MATRICES, scheme) is compiled
    expected = by_hand(PlainList)(batch)
    assert torch.equal(compiled(batch), expected)
    assert [weight.name for weight in one_bit_weights(compiled)] == ["a.weight", "b.weight"]
    path = pb.save(pb.convert(compiled), tmp_path / "net.safetensors")
    for into in (made(PlainList, 1), torch.compile(made(PlainList, 1), backend="eager")):
        torch.testing.assert_close(pb.load(path, into)(batch), expected)


def test_a_compiled_part_leaves_no_trace_in_the_file(batch, tmp_path):
    def network(compiled):
        layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        return nn.Sequential(torch.compile(layer, backend="eager") if compiled else layer, nn.Linear(8, 2))

    model = pb.prepare(network(True), MATRICES)
    path = pb.save(pb.convert(model), tmp_path / "net.safetensors")
    assert b"_orig_mod" not in path.read_bytes()
    torch.testing.assert_close(pb.load(path, network(False))(batch), model(batch))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_of_a_class_of_its_own_computes_as_it_did_or_is_refused(scheme, batch):
    model = made(UsesSubclass)
    if scheme == "brevitas":
        with pytest.raises(pb.TargetError, match="Subclassed"):
            pb.prepare(model, MATRICES, scheme)
        return
    pb.prepare(model, MATRICES, scheme)
    assert torch.equal(model(batch), by_hand(UsesSubclass)(batch))
    torch.testing.assert_close(pb.convert(model)(batch), model(batch))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prepared_and_packed_models_can_be_pickled(scheme, batch):
    if scheme == "brevitas":
        pytest.skip("Brevitas' injectors are classes made at run time, which pickle cannot name")
    model = pb.prepare(made(PlainList), MATRICES, scheme)
    for one in (model, pb.convert(model)):
        clone = pickle.loads(pickle.dumps(one))
        assert torch.equal(clone(batch), one(batch))
        assert pb.global_scale(clone) is not pb.global_scale(one)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformer_layers_hand_w_to_their_fused_kernel(scheme):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    twin, x = copy.deepcopy(layer), torch.randn(2, 3, 8)
    pb.prepare(layer, {"linear?.weight": None}, scheme)
    with torch.no_grad():
        for name in ("linear1", "linear2"):
            getattr(twin, name).weight.copy_(getattr(layer, name).weight)
        for mode in (True, False):
            torch.testing.assert_close(layer.train(mode)(x), twin.train(mode)(x))
            torch.testing.assert_close(pb.convert(layer)(x), twin(x))


# -------------------------------------------------------------------------------------------------------- no silence


def test_convert_compares_with_the_trained_model_where_it_has_inputs(batch, monkeypatch):
    model = pb.prepare(made(PlainList), MATRICES)
    pb.convert(model.train(), args=(batch,))
    assert model.training and model.a.training
    calls = []
    forward = PlainList.forward
    monkeypatch.setattr(PlainList, "forward", lambda self, x: calls.append(1) or forward(self, x) * (1 + len(calls)))
    with pytest.raises(pb.PIBiNNError, match="the packed network differs from the trained one"):
        pb.convert(model, args=(batch,))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_error_in_prepare_leaves_the_model_as_it_was(scheme, batch, monkeypatch):
    model = made(PlainList)
    handle = model.a.register_forward_hook(lambda *_: None)
    before, modules = model(batch), {name: type(module) for name, module in model.named_modules()}
    from pibinn_plugin.schemes import scheme_of

    kind, attach = type(scheme_of(scheme)), type(scheme_of(scheme)).attach
    attached = []

    def fail_at_the_second(self, *args):
        attached.append(attach(self, *args))
        if len(attached) == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(kind, "attach", fail_at_the_second)
    with pytest.raises(RuntimeError, match="memory"):
        pb.prepare(model, MATRICES, scheme)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert torch.equal(model(batch), before)
    handle.remove()
    assert not model.a._forward_hooks
    monkeypatch.undo()
    assert torch.equal(pb.prepare(model, MATRICES, scheme)(batch), by_hand(PlainList)(batch))


def test_a_file_that_does_not_fit_leaves_a_packed_model_as_it_was(batch, tmp_path):
    def network():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    model = pb.convert(pb.prepare(network(), {"0.weight": None})).eval()
    before = model(batch)
    other = pb.prepare(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), {"0.weight": None})
    path = pb.save(pb.convert(other), tmp_path / "net.safetensors")
    with pytest.raises(pb.ArtifactError, match="running_mean"):
        pb.load(path, into=model)
    assert torch.equal(model(batch), before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_read_as_w_with_its_gradient_prepared_and_packed(scheme):
    model = pb.prepare(nn.Sequential(nn.Linear(8, 6)), {"0.weight": pb.BlockDiagonal(2)}, scheme)
    latent = quantized_weights(model)[0].latent
    upstream = torch.randn(6, 8)
    (model[0].weight * upstream).sum().backward()
    mask, scale = pb.BlockDiagonal(2).mask((6, 8)), pb.global_scale(model)
    torch.testing.assert_close(latent.grad, torch.where(mask, upstream * scale().item(), 0.0))
    torch.testing.assert_close(scale.value.grad, (upstream * torch.where(latent >= 0, 1, -1) * mask).sum().reshape(1))
    packed = pb.convert(model)
    assert torch.equal(packed[0].weight, model[0].weight)
    (packed[0].weight * upstream).sum().backward()
    torch.testing.assert_close(pb.global_scale(packed).value.grad, scale.value.grad)
    torch.testing.assert_close(F.linear(torch.eye(8), packed[0].weight), F.linear(torch.eye(8), model[0].weight))
