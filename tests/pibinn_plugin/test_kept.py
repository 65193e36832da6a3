"""Weights that are unpacked once: always what unpacking anew would give, and in no state dict, copy or export."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize

import pibinn_plugin as pb
from pibinn_plugin import unpack_signs as unpack_signs_module
from pibinn_plugin.packed import keep_unpacked, unpacked_bytes
from pibinn_plugin.packing import unpack_signs


class Raw(nn.Module):
    """A raw parameter: its product reads it as a tensor."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return x @ self.matrix.T


def packed_model():
    return pb.convert(pb.prepare(Raw(), {"matrix": None}))


def bits_of(model):
    return model.parametrizations.matrix.original


def expected(model, dtype=torch.float32):
    """By the definition, from what the model holds now."""
    return pb.global_scale(model).value.detach().abs().to(dtype) * unpack_signs(bits_of(model), (6, 8), dtype)


CHANGES = {
    "set": lambda model: pb.global_scale(model).set(0.3),
    "fill": lambda model: pb.global_scale(model).value.fill_(0.4),
    "data": lambda model: pb.global_scale(model).value.data.fill_(0.5),
    "replaced": lambda model: setattr(pb.global_scale(model), "value", nn.Parameter(torch.tensor([0.6]))),
    "bits": lambda model: bits_of(model).bitwise_not_(),
    "one bit": lambda model: bits_of(model)[2].bitwise_xor_(1),
    "load": lambda model: model.load_state_dict(packed_model().state_dict()),
    "load, assigned": lambda model: model.load_state_dict(packed_model().state_dict(), assign=True),
    "bits exchanged": lambda model: setattr(bits_of(model), "data", ~bits_of(model)),
    "bits swapped": lambda model: torch.utils.swap_tensors(bits_of(model), ~bits_of(model)),
    "written to": lambda model: model.matrix.mul_(2),
    "clamped from above": lambda model: model.matrix.clamp_(max=0),
    "clamped": lambda model: model.matrix.data.clamp_(min=0),
    "scale exchanged": lambda model: setattr(pb.global_scale(model).value, "data", torch.tensor([0.7])),
    "weight exchanged": lambda model: setattr(model.matrix, "data", torch.ones(6, 8)),
    "storage given back": lambda model: model.matrix.untyped_storage().resize_(0),
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_weight_is_read_again_and_is_what_unpacking_gives_after_any_change(change, mode):
    model = packed_model()
    with torch.no_grad():
        assert model.matrix is model.matrix
        torch.testing.assert_close(model.matrix, expected(model), rtol=0, atol=0)
    with mode():
        CHANGES[change](model)
    with torch.no_grad():
        dtype = torch.float16 if change == "half" else torch.float32
        assert torch.equal(model.matrix, expected(model, dtype)) and model.matrix.dtype == dtype
        # Tensors that were made in inference mode count no writes: nothing is kept for them.
        counts = not (bits_of(model).is_inference() or pb.global_scale(model).value.is_inference())
        assert (model.matrix is model.matrix) == counts


def test_memory_is_counted_and_a_switch_frees_it():
    model = packed_model()
    assert unpacked_bytes(model) == 0
    with torch.no_grad():
        output = model(torch.ones(1, 8))
        assert unpacked_bytes(model) == 6 * 8 * 4
        keep_unpacked(model, False)
        assert torch.equal(model(torch.ones(1, 8)), output) and unpacked_bytes(model) == 0
        keep_unpacked(model)
        assert torch.equal(model(torch.ones(1, 8)), output) and unpacked_bytes(model) == 6 * 8 * 4


def saved_whole(model):
    """What ``torch.save`` and ``torch.load`` make of the module itself."""
    torch.save(model, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_copies_pickles_and_state_dicts_hold_bits_alone():
    torch.manual_seed(0)
    model, other = packed_model(), packed_model()
    with torch.no_grad():
        model.matrix  # noqa: B018 - reading it keeps it
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved_whole(model)):
        assert unpacked_bytes(copied) == 0
        with torch.no_grad():
            assert torch.equal(copied.matrix, model.matrix) and copied.matrix is not model.matrix
    assert model.state_dict().keys() == other.state_dict().keys()
    sizes = []
    for each in (model, other):
        torch.save(each.state_dict(), file := io.BytesIO())
        sizes.append(len(file.getvalue()))
    assert sizes[0] == sizes[1]


def test_a_kept_weight_is_no_parameter_no_buffer_and_in_no_file(tmp_path):
    model = packed_model()
    names = [[name for name, _ in found()] for found in (model.named_parameters, model.named_buffers)]
    pb.save(model, tmp_path / "before.safetensors")
    with torch.no_grad():
        model(torch.ones(1, 8))
    assert unpacked_bytes(model) > 0
    assert names == [[name for name, _ in found()] for found in (model.named_parameters, model.named_buffers)]
    pb.save(model, tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()


def test_training_and_evaluation_by_turns_read_the_same_weight_and_reach_lambda():
    model, x = packed_model(), torch.randn(3, 8)
    for _ in range(2):
        with torch.no_grad():
            kept = model.eval()(x)
        model.train()(x).sum().backward()
        with torch.no_grad():
            pb.global_scale(model).value -= 0.01 * pb.global_scale(model).value.grad
            torch.testing.assert_close(model(x), x @ expected(model).T)
            assert not torch.equal(model(x), kept)


def test_where_lambda_has_a_gradient_nothing_is_kept():
    model, x = packed_model(), torch.randn(3, 8)
    with torch.no_grad():
        model(x)
    output = model(x)
    assert unpacked_bytes(model) == 0
    (gradient,) = torch.autograd.grad(output.sum(), pb.global_scale(model).value)
    torch.testing.assert_close(gradient, (output.sum() / pb.global_scale(model).value).detach())


def test_a_weight_first_read_in_inference_mode_takes_part_in_gradients():
    model = packed_model()
    pb.global_scale(model).requires_grad_(False)
    with torch.inference_mode():
        weight = model.matrix
    x = torch.randn(3, 8, requires_grad=True)
    model(x).square().sum().backward()
    assert model.matrix is weight
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.T) @ weight)


@torch.no_grad()
def test_functional_call_and_vmap_use_the_values_that_they_are_given():
    model, x = packed_model(), torch.randn(3, 8)
    before = model(x)
    scales = torch.tensor([[0.5], [2.0]])
    name = "pibinn_scale.value"

    def call(scale):
        return torch.func.functional_call(model, {name: scale}, (x,))

    each = [x @ (scale * expected(model).sign()).T for scale in scales]
    for scale, output in zip(scales, each, strict=True):
        torch.testing.assert_close(call(scale), output)
    torch.testing.assert_close(torch.vmap(call)(scales), torch.stack(each))
    torch.testing.assert_close(torch.vmap(model)(x), before)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_what_is_compiled_traced_or_exported_unpacks_the_bits_itself():
    model, x = packed_model(), torch.randn(3, 8)
    model(x)  # so that there is a weight that could be taken for a constant
    compiled = torch.compile(model, fullgraph=True)
    traced = torch.jit.trace(model, (x,))
    exported = torch.export.export(model, (x,)).module()
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda scale: torch.func.functional_call(model, scale, (x,)))(
        {"pibinn_scale.value": torch.tensor([1.0])}
    )
    for function in (compiled, traced, exported):
        torch.testing.assert_close(function(x), model(x))
    pb.global_scale(model).set(0.123)
    bits_of(model).bitwise_not_()
    for function in (compiled, traced):
        torch.testing.assert_close(function(x), x @ expected(model).T)
    doubled = graph({"pibinn_scale.value": torch.tensor([2.0])})
    torch.testing.assert_close(doubled, 2 * graph({"pibinn_scale.value": torch.tensor([1.0])}))
    exported.pibinn_scale.value.fill_(0.5)
    torch.testing.assert_close(
        exported(x).abs().max(), (x @ (0.5 * expected(packed_like(exported)).sign()).T).abs().max()
    )


def packed_like(exported):
    """A model with the state of an exported program."""
    model = packed_model()
    model.load_state_dict(exported.state_dict(), strict=False)
    return model


def test_threads_that_read_while_another_writes_end_with_the_last_value():
    model, errors = packed_model(), []

    def read():
        with torch.no_grad():
            for _ in range(300):
                if not torch.equal((weight := model.matrix).abs(), weight.abs().amax().expand(6, 8)):
                    errors.append(weight)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for value in torch.linspace(0.1, 1, 100).tolist():
        pb.global_scale(model).set(value)
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert not errors and torch.equal(model.matrix, expected(model))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (8,), (0, 8)])
def test_small_linear_layers_give_what_a_linear_layer_of_the_weight_gives(shape):
    model = pb.convert(pb.prepare(nn.Sequential(nn.Linear(8, 6)), {"0.weight": None}))
    x = torch.randn(shape)
    assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert unpacked_bytes(model) == 6 * 8 * 4
    keep_unpacked(model, False)
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))


@torch.no_grad()
def test_layers_keep_a_weight_where_the_kernel_cannot_multiply():
    layer = pb.convert(pb.prepare(nn.Sequential(nn.Linear(256, 256)).double(), {"0.weight": None}))
    x = torch.randn(64, 256)
    torch.testing.assert_close(layer(x.double()), F.linear(x.double(), layer[0].weight, layer[0].bias))
    assert unpacked_bytes(layer) == 8 * 256 * 256


class Tied(Raw):
    """One parameter, read several times, once inside of a checkpoint."""

    def forward(self, x):
        def step(x):
            return (x @ self.matrix.T @ self.matrix).tanh()

        return step(torch.utils.checkpoint.checkpoint(step, step(x), use_reentrant=False))


class CachedTied(Tied):
    """The same, as torch has it for parameters that are computed and read several times."""

    def forward(self, x):
        with parametrize.cached():
            return super().forward(x)


@pytest.mark.parametrize("small", [2**16, 0], ids=["unpacked by the graph", "kept"])
@pytest.mark.parametrize(
    ("network", "mode"), [(Tied, torch.no_grad), (Tied, torch.inference_mode), (CachedTied, torch.no_grad)]
)
def test_compiled_code_that_reads_a_weight_sees_every_change(network, mode, small, monkeypatch):
    monkeypatch.setattr(unpack_signs_module, "_SMALL_IN_GRAPHS", small)
    torch._dynamo.reset()
    model, x = pb.convert(pb.prepare(network(), {"matrix": None})), torch.randn(3, 8)
    pb.global_scale(model).requires_grad_(False)
    compiled = torch.compile(model)

    def check():
        plain = Raw()
        plain.matrix.data = expected(model)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), Tied.forward(plain, x))
            torch.testing.assert_close(model(x), Tied.forward(plain, x))

    with mode():
        compiled(x)
        assert unpacked_bytes(model) == (0 if small else 6 * 8 * 4)  # by compiled code alone
        check()
        for change in ("set", "data", "bits", "one bit", "load", "set", "clamped", "clamped"):
            CHANGES[change](model)
            check()
        assert unpacked_bytes(model) == 6 * 8 * 4
        for enabled in (False, True):
            keep_unpacked(model, enabled)
            compiled(x)
            assert unpacked_bytes(model) == 0 or enabled
            check()
    given = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(given).sum(), given)
    torch.testing.assert_close(gradient, torch.autograd.grad(model(given).sum(), given)[0])


class WritesBits(Raw):
    """Reads its weight twice, and flips signs between: all of them, or one byte through a view."""

    def __init__(self, flip):
        super().__init__()
        self.flip = flip

    def forward(self, x):
        before = x @ self.matrix.T
        self.flip(bits_of(self))
        return before, x @ self.matrix.T


@torch.no_grad()
@pytest.mark.parametrize("flip", [lambda bits: bits.bitwise_not_(), lambda bits: bits[1:2].bitwise_xor_(37)])
def test_compiled_code_that_writes_to_bits_reads_what_it_wrote(flip):
    model, x = pb.convert(pb.prepare(WritesBits(flip), {"matrix": None})), torch.randn(3, 8)
    before = x @ expected(model).T
    flip(bits_of(model))
    after = x @ expected(model).T
    flip(bits_of(model))
    compiled = torch.compile(model, fullgraph=True)
    for expectation in ((before, after), (after, before)):
        for output, value in zip(compiled(x), expectation, strict=True):
            torch.testing.assert_close(output, value)


@torch.no_grad()
@pytest.mark.parametrize("small", [2**16, 0], ids=["unpacked by the graph", "kept"])
def test_compiled_code_unpacks_a_weight_once_and_never_copies_it(small, monkeypatch):
    monkeypatch.setattr(unpack_signs_module, "_SMALL_IN_GRAPHS", small)
    model, x = pb.convert(pb.prepare(Tied(), {"matrix": None})), torch.randn(3, 8)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.compile(model, backend=aot_autograd(fw_compiler=keep))(x)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    brings = [name for name in called if "functionalized" in name or "refresh" in name]
    assert (called.count("aten.bitwise_and.Tensor"), len(brings)) == ((1, 0) if small else (0, 1))
