"""Bits that a layer keeps in the order of their use: always those that it has, and in no state dict, copy or export."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.functional import kernel, packed_linear
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import keep_unpacked, unpacked_bytes

pytestmark = pytest.mark.skipif(kernel() == "torch", reason="without the native kernel there is nothing to lay out")


def packed_model(structure=None, columns=256, rows=128):
    layer = CompactLinear(columns, rows, structure or pb.BlockDiagonal(2))
    return pb.convert(pb.prepare(nn.Sequential(layer), {"0.weight": None}))


def bits_of(model):
    return model[0].bits


def expected(model, x):
    """The product of the bits as they are stored."""
    layer = model[0]
    with torch.no_grad():
        bias = None if layer.bias is None else layer.bias
        return packed_linear(x, layer.bits, layer._rule.scale(), layer._rule.structure, layer._rule.shape, bias)


CHANGES = {
    "bits": lambda model: bits_of(model).bitwise_not_(),
    "one bit": lambda model: bits_of(model)[2].bitwise_xor_(1),
    "scale": lambda model: pb.global_scale(model).set(0.3),
    "load": lambda model: model.load_state_dict(packed_model().state_dict()),
    "load, assigned": lambda model: model.load_state_dict(packed_model().state_dict(), assign=True),
    "replaced": lambda model: model[0].parametrizations.weight.register_buffer("original", ~bits_of(model)),
    "replaced by its data": lambda model: model[0].parametrizations.weight.register_buffer(
        "original", bits_of(model).data.bitwise_not_().data
    ),
    "data": lambda model: (bits_of(model).data.bitwise_not_(), keep_unpacked(model)),
    "data, assigned": lambda model: setattr(bits_of(model), "data", ~bits_of(model)),
    "swapped": lambda model: torch.utils.swap_tensors(bits_of(model), ~bits_of(model)),
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("samples", [1, 9])
def test_the_product_is_that_of_the_bits_after_any_change(change, mode, samples):
    model, x = packed_model(), torch.randn(samples, 256)
    with mode():
        before = model(x)
        assert unpacked_bytes(model) == bits_of(model).nbytes and torch.equal(before, expected(model, x))
        CHANGES[change](model)
        x = x.to(model[0].bias.dtype)
        for _ in range(2):
            assert torch.equal(model(x), expected(model, x))
        assert not torch.equal(model(x), before)
        # Tensors that were made in inference mode count no writes: nothing is kept for them.
        assert unpacked_bytes(model) == (0 if bits_of(model).is_inference() else bits_of(model).nbytes)


def test_bits_are_laid_out_once():
    model, x = packed_model(), torch.randn(1, 256)
    with torch.no_grad():
        model(x)
        kept = model[0]._rule._words
        model(x)
    assert model[0]._rule._words is kept


@torch.no_grad()
def test_a_switch_frees_the_memory():
    model, x = packed_model(), torch.randn(3, 256)
    output = model(x)
    keep_unpacked(model, False)
    assert torch.equal(model(x), output) and unpacked_bytes(model) == 0
    keep_unpacked(model)
    assert torch.equal(model(x), output) and unpacked_bytes(model) == bits_of(model).nbytes


@torch.no_grad()
@pytest.mark.parametrize(
    ("structure", "columns", "rows", "factor"),
    [
        (pb.BlockDiagonal(rows=(96, 32), columns=(96, 160)), 256, 128, 1),
        (pb.Dense(), 250, 333, 256 * 352 / (250 * 333)),
        (pb.BlockDiagonal(16), 256, 1024, 0),  # blocks of 16 columns would take twice the memory
        (pb.Banded(3, 3), 128, 128, 0),  # multiplied by an index
    ],
)
def test_what_is_kept_is_little_larger_than_the_bits(structure, columns, rows, factor):
    model, x = packed_model(structure, columns, rows), torch.randn(200, columns)
    assert torch.equal(model(x), expected(model, x))
    assert unpacked_bytes(model) == round(factor * structure.nnz((rows, columns)) / 8)


def test_copies_pickles_state_dicts_and_files_hold_the_stored_bits_alone(tmp_path):
    model, x = packed_model(), torch.randn(3, 256)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    pb.save(model, tmp_path / "before.safetensors")
    with torch.no_grad():
        output = model(x)
    pb.save(model, tmp_path / "after.safetensors")
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_buffers()] == names
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert unpacked_bytes(model) > 0 == unpacked_bytes(copied)
        with torch.no_grad():
            assert torch.equal(copied(x), output)


@torch.no_grad()
def test_what_is_compiled_traced_or_exported_multiplies_the_bits_that_there_are():
    model, x = packed_model(), torch.randn(3, 256)
    model(x)  # so that there is something that could be taken for a constant
    compiled, traced = torch.compile(model, fullgraph=True), torch.jit.trace(model, (x,))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    for _ in range(2):
        for function in (compiled, traced):
            torch.testing.assert_close(function(x), expected(model, x))
        bits_of(model).bitwise_not_()
    swapped = {"0.parametrizations.weight.original": ~bits_of(model)}
    before = model(x)
    torch.testing.assert_close(torch.func.functional_call(model, swapped, (x,)) - model[0].bias, model[0].bias - before)
    assert torch.equal(model(x), before)


def test_products_with_a_gradient_and_adjoints_take_the_stored_bits():
    model = packed_model()
    x = torch.randn(3, 256, requires_grad=True)
    with torch.no_grad():
        output = model(x)
        adjoint = model[0].adjoint(output)
    torch.testing.assert_close(model(x), output)
    torch.testing.assert_close(torch.autograd.grad(model(x), x, output)[0], adjoint)


def test_threads_that_multiply_while_another_writes_end_with_the_last_bits():
    model, x = packed_model(), torch.randn(1, 256)
    with torch.no_grad():
        outputs = [model(x)]
        bits_of(model).bitwise_not_()
        outputs.append(model(x))

    def read():
        with torch.no_grad():
            for _ in range(200):
                model(x)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(101):
        bits_of(model).bitwise_not_()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert torch.equal(model(x), outputs[0]) and not torch.equal(*outputs)
