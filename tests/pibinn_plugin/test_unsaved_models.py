"""Models that a packed file cannot hold: refused before the file is touched; and names that `torch.compile` adds."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pibinn_plugin import ArtifactError, PIBiNNError, ScaleError, convert, global_scale, load, prepare, save


class WithState(nn.Module):
    """A module whose extra state is any object."""

    def __init__(self, state):
        super().__init__()
        self.linear, self.state = nn.Linear(4, 4), state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        return self.linear(x)


def packed_with(change):
    packed = convert(prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"*.weight": None}))
    change(packed)
    return packed


def set_scale(value):
    def change(packed):
        with torch.no_grad():
            global_scale(packed).value.fill_(value)

    return change


def clash(packed):
    packed.pibinn = nn.Module()
    packed.pibinn.register_buffer("scale", torch.ones(1))


MODELS = {
    "a state that is no tensor": (
        lambda: convert(prepare(WithState({"epoch": 3}), {"linear.weight": None})),
        ArtifactError,
        "'_extra_state' is a dict; a packed file stores tensors only",
    ),
    "a sparse buffer": (
        lambda: packed_with(lambda packed: packed.register_buffer("operator", torch.eye(3).to_sparse())),
        ArtifactError,
        "'operator' is stored as torch.sparse_coo",
    ),
    "a name of the file": (lambda: packed_with(clash), ArtifactError, r"\['pibinn.scale'\] have names"),
    "a NaN scale": (lambda: packed_with(set_scale(float("nan"))), ScaleError, "scale is nan"),
    "an infinite scale": (lambda: packed_with(set_scale(float("inf"))), ScaleError, "scale is inf"),
    "a part that is not packed": (
        lambda: packed_with(lambda packed: packed.append(prepare(nn.Linear(4, 4), {"weight": None}))),
        PIBiNNError,
        "convert it first",
    ),
    "nothing packed": (lambda: nn.Linear(4, 4), PIBiNNError, "convert it first"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_file_cannot_hold_is_refused(name, tmp_path):
    make, error, words = MODELS[name]
    path = tmp_path / "net.safetensors"
    path.write_text("what was there before")
    with pytest.raises(error, match=words):
        save(make(), path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "what was there before"


def test_a_state_that_is_a_tensor_is_stored(tmp_path):
    packed = convert(prepare(WithState(torch.tensor([3.0])), {"linear.weight": None}))
    loaded = load(save(packed, tmp_path / "net.safetensors"), into=WithState(torch.zeros(1)))
    assert loaded.state.tolist() == [3.0]


def test_compiled_parts_leave_no_trace_in_the_names(tmp_path):
    def network():
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))

    packed = convert(prepare(network(), {"*.weight": None}))
    plain = save(packed, tmp_path / "plain.safetensors").read_bytes()
    packed[1] = torch.compile(packed[1])
    path = save(packed, tmp_path / "compiled.safetensors")
    assert path.read_bytes() == plain
    with safe_open(path, "pt") as file:
        assert not any("_orig_mod" in key for key in file.keys())  # noqa: SIM118 - not a dictionary
    into = network()
    into[1] = torch.compile(into[1])
    x = torch.randn(2, 4)
    torch.testing.assert_close(load(path, into=into)(x), packed(x))
