"""Nothing is made on the default device in place of that of the model: what differs here differs on every GPU.

The default device is "meta" while a model on the CPU goes its way, so that a tensor that names no device meets the
others with an error, as one of the CPU would in a model on a GPU.
"""

import pytest
import torch
from every_layer import SCHEMES, TARGETS, Solver, step
from torch._subclasses.fake_tensor import FakeTensorMode

import pibinn_plugin as pb
from pibinn_plugin.packed import keep_unpacked
from pibinn_plugin.structure.base import constant
from pibinn_plugin.workflow import freeze_signs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_latents_to_a_file(scheme, tmp_path):
    model, x = Solver(), torch.randn(5, 6)
    with torch.device("meta"):
        pb.prepare(model, TARGETS, scheme)
        step(model, x)
        freeze_signs(model)
        step(model, x)
        packed = pb.convert(model)
        for keeps in (True, False):
            keep_unpacked(packed, keeps)
            packed(x).sum().backward()
            with torch.no_grad():
                output = packed(x)
        pb.save(packed, tmp_path / "solver.safetensors")
    for each in (model, packed):
        tensors = dict([*each.named_parameters(), *each.named_buffers()])
        assert [name for name, tensor in tensors.items() if tensor.device.type != "cpu"] == []
    torch.testing.assert_close(output, model(x))
    torch.testing.assert_close(pb.load(tmp_path / "solver.safetensors", into=Solver())(x), output)


def test_an_index_has_one_copy_on_a_device_and_another_in_each_trace():
    index, device = torch.arange(3), torch.device("meta")
    copy = constant(index, device)
    assert copy.device == device and constant(index, device) is copy
    assert constant(index, "cpu") is index
    with FakeTensorMode():
        traced = constant(index, device)
    assert traced.device == device and type(traced) is not type(copy)


@pytest.mark.parametrize("structure", [pb.Banded(1, 1), pb.BlockDiagonal(2), pb.Mask(torch.eye(4))], ids=repr)
def test_places_of_weights_have_one_copy_on_a_device(structure):
    device = torch.device("meta")
    assert structure._positions_on(device, (4, 4)) is structure._positions_on(device, (4, 4))
    compact = torch.empty(structure.compact_shape((4, 4)), device=device)
    assert structure.to_dense(compact, (4, 4)).device == device
