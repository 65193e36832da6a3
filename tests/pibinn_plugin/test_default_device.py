"""Nothing is made on the default device in place of that of the model: what differs here differs on every GPU.

The default device is "meta" while a model on the CPU goes its way, so that a tensor that names no device meets the
others with an error, as one of the CPU would in a model on a GPU.
"""

import pytest
import torch
from every_layer import SCHEMES, TARGETS, Solver, step

import pibinn_plugin as pb
from pibinn_plugin.packed import keep_unpacked
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
