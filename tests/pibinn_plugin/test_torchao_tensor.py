"""The packed tensor of the torchao scheme: read as the weight that it is, saved, moved, copied and compiled."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torchao.quantization import quantize_

from pibinn_plugin import PIBiNNError, StructureError
from pibinn_plugin.functional import kernel
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.schemes.torchao import PIBiNNWeightOnlyConfig
from pibinn_plugin.schemes.torchao_tensor import PIBiNNTensor
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask

EYE = Mask(torch.eye(8) + torch.eye(8).roll(1, 0))
PERMUTED = BlockDiagonal(2, row_order=(3, 1, 0, 2, 7, 6, 5, 4), column_order=(7, 0, 1, 6, 2, 5, 3, 4))


def float_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)))


def packed_model():
    model = float_model()
    quantize_(model, PIBiNNWeightOnlyConfig(BlockDiagonal(4)))
    return model


@pytest.fixture
def batch():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_trap_a_packed_state_dict_loads_strictly_into_a_fresh_model(batch):
    model = packed_model()
    fresh = float_model(1)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(fresh(batch), model(batch))


def test_a_packed_tensor_is_read_as_w_by_any_operator():
    model = packed_model()
    weight = model[0].weight
    dense = weight.dequantize()
    x, bias = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(F.linear(x, weight.t()), F.linear(x, dense.t()))
    assert torch.equal(torch.addmm(bias, x, weight), torch.addmm(bias, x, dense))
    assert torch.equal(weight[1:3], dense[1:3])
    assert torch.equal((weight * 2).sum(0), (dense * 2).sum(0))
    assert torch.equal(torch.einsum("bi,oi->bo", x, weight), torch.einsum("bi,oi->bo", x, dense))
    with pytest.raises(PIBiNNError, match="read only"):
        weight.mul_(2)


def test_a_copy_of_a_packed_tensor_shares_nothing():
    weight = packed_model()[0].weight.detach()
    before = weight.dequantize().clone()
    clone = weight.to(torch.float32, copy=True)
    clone.bits.bitwise_not_()
    clone.scale.zero_()
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("on_meta", [False, True])
def test_trap_weights_only_load_of_a_packed_state_dict(on_meta, batch):
    model, file = packed_model(), io.BytesIO()
    torch.save({key: value for key, value in model.state_dict().items() if "pibinn_scale" not in key}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.device("meta" if on_meta else "cpu"):
        target = float_model(1)
    target.load_state_dict(state, assign=True)
    assert torch.equal(target(batch), model(batch))
    assert target[0].weight.packed_signs.structure == BlockDiagonal(4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_trap_to_keeps_the_asked_for_dtype(dtype, batch):
    model = packed_model()
    weight = model[0].weight.dequantize()
    moved = model[0].weight.to(dtype)
    assert (moved.dtype, moved.dequantize().dtype, moved.bits.dtype) == (dtype, dtype, torch.uint8)
    assert torch.equal(moved.dequantize(), weight.to(dtype))
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(batch.to(dtype)).dtype == dtype


def test_packed_tensor_is_copied_and_detached_like_a_weight(batch):
    model = packed_model()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(batch), model(batch))
    clone[0].weight.scale.fill_(9.0)
    assert not torch.equal(clone(batch), model(batch))
    detached = model[0].weight.detach()
    assert isinstance(detached, PIBiNNTensor)
    assert torch.equal(detached.dequantize(), model[0].weight.dequantize())
    assert "PIBiNNTensor" in repr(model[0].weight)


@pytest.mark.parametrize("structure", [BlockDiagonal(4), PERMUTED, EYE], ids=lambda structure: structure.kind)
def test_packed_model_compiles_without_a_graph_break(structure, batch):
    """The indices of a structure are real tensors, the tensors of a trace fake ones."""
    model = float_model()[:2]
    quantize_(model, PIBiNNWeightOnlyConfig(structure))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), model(batch))


@pytest.mark.skipif(kernel() == "torch", reason="the native kernel was not built, or is switched off")
@pytest.mark.parametrize("structure", [BlockDiagonal(4), PERMUTED, EYE, Banded(1, 0)], ids=str)
def test_a_compiled_packed_model_multiplies_its_bits_as_they_are(structure, batch):
    model, called = float_model()[:1], []
    quantize_(model, PIBiNNWeightOnlyConfig(structure))

    def keep(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch), model(batch))
    assert len([name for name in called if name.startswith("pibinn.packed_linear")]) == 1
    assert not any("bitwise_and" in name for name in called)


def test_packed_tensor_that_does_not_fit_its_bits_is_refused():
    bad = PIBiNNTensor(torch.zeros(3, dtype=torch.uint8), torch.ones(1), Dense().to_json(), [4, 4], torch.float32)
    for use in (lambda: bad.packed_signs, bad.dequantize):
        with pytest.raises(StructureError, match=r"uint8 of shape \(2,\)"):
            use()
    good = PackedSigns.pack(torch.randn(4, 4), Dense(), (4, 4))
    tensor = PIBiNNTensor(good.bits, torch.ones(1), Dense().to_json(), [4, 4], torch.float32)
    assert torch.equal(tensor.packed_signs.bits, good.bits)


def test_gradients_pass_through_packed_layers_to_the_input(batch):
    model = packed_model()
    input = batch.clone().requires_grad_()
    model(input).sum().backward()
    twin = float_model()
    weights = iter([model[0].weight, model[2][0].weight, model[2][1].weight])
    with torch.no_grad():
        for layer in (twin[0], twin[2][0], twin[2][1]):
            layer.weight.copy_(next(weights).dequantize())
        twin[0].bias.copy_(model[0].bias)
        twin[2][1].bias.copy_(model[2][1].bias)
    twin_input = batch.clone().requires_grad_()
    twin(twin_input).sum().backward()
    torch.testing.assert_close(input.grad, twin_input.grad)
