"""Training costs what the structure costs: no tensor of the dense size anywhere in a step of a compact layer."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pibinn_plugin as pb
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, CompactLinear

FEATURES, BATCH = 512, 2


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, backward and optimizer included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def layers() -> list[CompactLinear]:
    return [BlockDiagonalLinear(FEATURES, FEATURES, 16), BandedLinear(FEATURES, FEATURES, 8, 8)]


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
@pytest.mark.parametrize("layer", layers(), ids=lambda layer: layer.structure.kind)
def test_no_tensor_of_a_step_is_larger_than_the_nonzeros_or_the_activations(layer, scheme):
    model = pb.prepare(nn.Sequential(copy.deepcopy(layer)), {"0.weight": None}, scheme)
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(BATCH, FEATURES, requires_grad=True)
    with LargestTensor() as largest:
        model(x).square().mean().backward()
        optimizer.step()
    nnz = layer.structure.nnz(layer.dense_shape)
    # Index tensors have 8 bytes an element; a banded product gathers one input for each nonzero.
    assert nnz <= largest.elements <= 2 * BATCH * nnz < FEATURES * FEATURES / 3
    assert x.grad is not None


def test_the_measure_sees_a_dense_weight():
    model = pb.prepare(nn.Sequential(nn.Linear(FEATURES, FEATURES)), {"0.weight": pb.BlockDiagonal(16)})
    with LargestTensor() as largest:
        model(torch.randn(BATCH, FEATURES)).square().mean().backward()
    assert largest.elements >= FEATURES * FEATURES


def test_optimizer_state_and_checkpoint_go_with_the_nonzeros(tmp_path):
    layer = BlockDiagonalLinear(FEATURES, FEATURES, 16, bias=False)
    model = pb.prepare(nn.Sequential(layer), {"0.weight": None})
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(BATCH, FEATURES)).square().mean().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    nnz = layer.structure.nnz(layer.dense_shape)
    assert (tmp_path / "checkpoint.pt").stat().st_size < 3 * 4 * nnz + 8_000  # latents and two moments
