"""Networks that the tests of the exports share."""

import copy

import torch
from torch import nn

import pibinn_plugin as pb
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA
from lightning_modules.solvers.hidden_lista import HiddenLISTA
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear
from pibinn_plugin.workflow import quantized_weights

SCHEMES = ("native", "torchao", "brevitas")


def shuffled(count, seed):
    return tuple(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist())


def random_mask(*shape, density):
    return pb.Mask(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density)


PERMUTED = pb.BlockDiagonal(4, row_order=shuffled(16, 0), column_order=shuffled(32, 1))
UNEVEN = pb.BlockDiagonal(rows=(9, 4, 3), columns=(6, 10, 16))
EMPTY_BLOCK = pb.BlockDiagonal(rows=(9, 4, 3), columns=(6, 0, 26))
UNEVEN_PERMUTED = pb.BlockDiagonal(
    rows=(9, 4, 3), columns=(6, 10, 16), row_order=shuffled(16, 2), column_order=shuffled(32, 3)
)


class MaskedOperator:
    """A physics operator whose adjoint has no rule but its mask."""

    shape = (16, 32)

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(self.shape, generator=generator) / 4
        self.matrix *= torch.rand(self.shape, generator=generator) < 0.4

    def A(self, x):
        return x @ self.matrix.T

    def A_adjoint(self, y):
        return y @ self.matrix


class RawParameter(nn.Module):
    """A network that holds its weight itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))

    def forward(self, x):
        return torch.relu(x @ self.weight.T)


def linear(structure):
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), {"0.weight": structure, "2.weight": None}


def compact(structure):
    return nn.Sequential(BlockDiagonalLinear(32, 16, structure), nn.ReLU()), {"0.weight": None}


def convolutions():
    two = nn.Conv2d(1, 4, (1, 3), stride=(1, 2))
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), nn.Unflatten(1, (1, 8)), two)
    return model, {"0.weight": pb.BlockDiagonal(2), "2.weight": random_mask(4, 1, 1, 3, density=0.6)}


# name -> the network with its targets, and the shape of one input
NETWORKS = {
    "dense": (lambda: linear(None), (32,)),
    "bitmap": (lambda: linear(random_mask(16, 32, density=0.5)), (32,)),
    "sparse_rows": (lambda: linear(random_mask(16, 32, density=0.02)), (32,)),
    "tiles": (lambda: linear(pb.Mask(torch.eye(4).repeat_interleave(4, 0).repeat_interleave(8, 1).flip(0))), (32,)),
    "masked_band": (lambda: linear(pb.Banded(2, 5)), (32,)),
    "masked_blocks": (lambda: linear(UNEVEN_PERMUTED), (32,)),
    "blocks": (lambda: compact(pb.BlockDiagonal(4)), (32,)),
    "permuted": (lambda: compact(PERMUTED), (32,)),
    "uneven": (lambda: compact(UNEVEN), (32,)),
    "empty_block": (lambda: compact(EMPTY_BLOCK), (32,)),
    "uneven_permuted": (lambda: compact(UNEVEN_PERMUTED), (32,)),
    "band": (lambda: (nn.Sequential(BandedLinear(32, 16, 2, 3, bias=False), nn.ReLU()), {"0.weight": None}), (32,)),
    "convolutions": (convolutions, (4, 10)),
    "coupled_ista": (lambda: (CoupledISTA(SignBlocks(2, 8, 16), layers=2), {"layers.*.weight": None}), (16,)),
    "masked_ista": (lambda: (CoupledISTA(MaskedOperator(), layers=2), _masked_ista_targets()), (16,)),
    "hidden_lista": (
        lambda: (HiddenLISTA(channels=8, layers=2, stride=4, frequencies=4, groups=2), {"*convolution*.weight": None}),
        (32,),
    ),
}


class Parallel(nn.ModuleList):
    """Networks of one input, side by side."""

    def forward(self, x):
        return tuple(network(x) for network in self)


def parallel(*names):
    made = [NETWORKS[name][0]() for name in names]
    targets = {f"{i}.{name}": structure for i, (_, own) in enumerate(made) for name, structure in own.items()}
    return Parallel(model for model, _ in made), targets


_MASKS = ("dense", "bitmap", "sparse_rows", "tiles", "masked_band", "masked_blocks")
_COMPACT = ("blocks", "permuted", "uneven", "empty_block", "uneven_permuted", "band")
# The same networks in fewer files, for the exporters that take seconds a file.
FEW_NETWORKS = {
    "masks": (lambda: parallel(*_MASKS), (32,)),
    "compact": (lambda: parallel(*_COMPACT), (32,)),
    **{name: value for name, value in NETWORKS.items() if name not in _MASKS + _COMPACT},
}


def _masked_ista_targets():
    return {"layers.*.weight": pb.Mask(MaskedOperator().matrix.T != 0)}


def weak_network(name, scheme="native"):
    """A prepared network with |V / λ| < 0.5 everywhere: whoever rounds V / λ in place of its sign finds zeros."""
    torch.manual_seed(0)
    make, shape = (NETWORKS | FEW_NETWORKS)[name]
    model, targets = make()
    model = pb.prepare(copy.deepcopy(model), targets, scheme=scheme).eval()
    largest = pb.global_scale(model)().item() * 0.45
    with torch.no_grad():
        for weight in quantized_weights(model):
            weight.latent.uniform_(-largest, largest)
    return model, torch.randn(3, *shape)
