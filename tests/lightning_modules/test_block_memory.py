"""With block operators no tensor of all rows by all columns is ever made, operation by operation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import pibinn_plugin as pb
from lightning_modules.modules import SolverModule
from lightning_modules.operators import DenseOperator, SignBlocks
from lightning_modules.solvers.admm import UnrolledADMM
from lightning_modules.solvers.coupled_ista import CoupledISTA
from lightning_modules.solvers.learned_amp import LearnedAMP
from lightning_modules.solvers.lista import LISTA

BLOCKS, ROWS, COLUMNS = 128, 4, 8


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def live(operator, solver_class, path):
    """Build, prepare, train one step, convert, save and load."""
    targets = {"solver.*layers.*.weight": None}
    module = pb.prepare(SolverModule(solver_class(operator, layers=3)), targets)
    y = torch.randn(2, operator.shape[0])
    module(y).square().sum().backward()
    pb.freeze_signs(module)
    packed = pb.convert(module)
    pb.summary(packed)
    loaded = pb.load(pb.save(packed, path), into=SolverModule(solver_class(operator, layers=3)))
    assert torch.equal(loaded(y), packed(y))


@pytest.mark.parametrize("solver_class", [CoupledISTA, LISTA, UnrolledADMM, LearnedAMP])
def test_no_dense_tensor_in_the_life_of_a_solver(solver_class, tmp_path):
    with LargestTensor() as largest:
        live(SignBlocks(BLOCKS, ROWS, COLUMNS), solver_class, tmp_path / "solver.safetensors")
    assert largest.elements < BLOCKS * ROWS * BLOCKS * COLUMNS / 10


def test_the_structure_of_blocks_needs_no_dense_tensor():
    blocks = 512
    with LargestTensor() as largest:
        structure = pb.structure_from_operator(SignBlocks(blocks, ROWS, COLUMNS))
    assert structure == pb.BlockDiagonal(blocks)
    assert largest.elements < blocks * ROWS * blocks * COLUMNS / 2


def test_a_dense_operator_is_noticed(tmp_path):
    with LargestTensor() as largest:
        live(DenseOperator(torch.randn(32, 64)), CoupledISTA, tmp_path / "solver.safetensors")
    assert largest.elements >= 32 * 64
