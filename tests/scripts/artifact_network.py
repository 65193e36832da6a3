"""The network that the tests of packed files save, all that it may be loaded into, and how a bad file is refused."""

import pytest
import torch
from torch import nn

from pibinn_plugin import ArtifactError, load, prepare
from pibinn_plugin.nn import BlockDiagonalLinear
from pibinn_plugin.structure import BlockDiagonal, Mask

SCHEMES = ("native", "torchao", "brevitas")
TARGETS = {
    "solver.layers.*.weight": BlockDiagonal(2),
    "solver.compact.weight": None,
    "last.weight": Mask([[1, 0, 0, 1, 1, 1, 0, 1]] * 4),
}


class Network(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.solver = nn.Module()
        self.solver.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.solver.compact = BlockDiagonalLinear(8, 8, 4, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 4)
        self.register_buffer("gain", torch.rand(3))

    def forward(self, x):
        for layer in self.solver.layers:
            x = torch.tanh(layer(x)) * self.gain[0]
        return self.last(self.norm(self.solver.compact(x)))


def trained(scheme="native", seed=0):
    model = prepare(Network(seed), TARGETS, scheme)
    model(torch.randn(16, 8))  # statistics of the batch norm
    return model.eval()


INTO = {
    "float": lambda: Network(1),
    "meta": lambda: meta_network(),
    **{f"prepared {scheme}": lambda scheme=scheme: prepare(Network(1), TARGETS, scheme) for scheme in SCHEMES},
    "prepared meta": lambda: prepare(meta_network(), TARGETS),
}


def meta_network():
    with torch.device("meta"):
        return Network()


def state_of(model):
    """Everything that loading could have touched: tensors, types, identities."""
    return (
        [(name, type(module), id(module)) for name, module in model.named_modules()],
        {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()
         if isinstance(value, torch.Tensor)},
    )  # fmt: skip


def assert_refused(path, into, words, size=8):
    before, input = state_of(into), torch.ones(2, size)
    into.eval()
    output = into(input)
    with pytest.raises(ArtifactError, match=words):
        load(path, into)
    after = state_of(into)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    for key, (identity, value) in before[1].items():
        if "_extra_state" not in key:
            assert after[1][key][0] == identity
        assert torch.equal(after[1][key][1], value)
    assert torch.equal(into(input), output)
