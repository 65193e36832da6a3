"""One λ, whatever torch does to a prepared model: the traps that would take it apart or share it too widely."""

import copy
import pickle
import time
from datetime import timedelta

import pytest
import torch
from every_layer import SCHEMES, TARGETS, Solver, solver, step, weights_by_reference
from torch import nn
from torch.func import functional_call

from pibinn_plugin import convert, global_scale, prepare
from pibinn_plugin.workflow import quantized_weights


@pytest.fixture
def batch():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


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
        # gloo's thread needs the interpreter to let go of the last reduction, and the next line waits for that thread
        # with the interpreter in its hands.
        time.sleep(0.2)
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
