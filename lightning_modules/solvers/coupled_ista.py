"""CoupledISTA: unrolled ISTA with a known operator and learned weights in place of its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.operators import PhysicsOperator
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear, CompactLinear
from pibinn_plugin.structure import Banded, BlockDiagonal, Structure, structure_from_operator

__all__ = ["CoupledISTA", "soft_threshold"]


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """The proximal map of ``threshold · ‖x‖₁``: ``sign(x) max(|x| - threshold, 0)``, for a threshold of at least 0.

    Example:
        >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), torch.tensor(1.0))
        tensor([-1.,  0.,  2.])
    """
    return torch.relu(x - threshold) - torch.relu(-x - threshold)


class CoupledISTA(nn.Module):
    r"""Sparse recovery from y = A x + noise by K iterations with a weight W_k, step size g_k and threshold θ_k each.

    .. math:: x \leftarrow \mathrm{soft}(x + g_k W_k (y - A x), |\theta_k|), \quad k = 1 \dots K,

    from x = 0. It is LISTA with the coupling of its two weights that Chen, Liu, Wang and Yin ("Theoretical Linear
    Convergence of Unfolded ISTA and Its Practical Weights and Thresholds", NeurIPS 2018) prove necessary. W_k starts at
    Aᵀ and is stored with the structure of Aᵀ, so that blocks of the physics stay blocks of the network.

    Args:
        operator: A, with methods ``A`` and ``A_adjoint`` and a ``shape``.
        layers: K.

    Raises:
        ValueError: fewer than one layer; or, by ``forward``, measurements of another size than the operator's.

    Example:
        >>> from lightning_modules.operators import SignBlocks
        >>> solver = CoupledISTA(SignBlocks(blocks=2, rows=4, columns=8), layers=3)
        >>> solver.layers[0].weight.shape, solver(torch.zeros(5, 8)).shape
        (torch.Size([2, 8, 4]), torch.Size([5, 16]))
    """

    def __init__(self, operator: PhysicsOperator, layers: int = 12) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers={layers}: an unrolled solver has at least one")
        self.operator = operator
        adjoint = operator.A(torch.eye(operator.shape[1]))  # row j is A e_j: this is Aᵀ
        structure = structure_from_operator(adjoint)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = _float_layer(operator, structure)
            initial = structure.to_compact(adjoint) if isinstance(layer, CompactLinear) else adjoint
            layer.weight = nn.Parameter(initial.clone())
            self.layers.append(layer)
        step_size = 1 / float(torch.linalg.matrix_norm(adjoint, 2)) ** 2
        self.step_sizes = nn.Parameter(torch.full((layers,), step_size))
        self.thresholds = nn.Parameter(torch.full((layers,), 0.05))

    def forward(self, y: Tensor) -> Tensor:
        """Recover the unknowns.

        Args:
            y: measurements, shape ``(batch, measurements)``.

        Returns:
            The estimate, shape ``(batch, unknowns)``.
        """
        if y.shape[-1] != self.operator.shape[0]:
            raise ValueError(f"y has shape {tuple(y.shape)}; the operator gives {self.operator.shape[0]} measurements")
        x = y.new_zeros((*y.shape[:-1], self.operator.shape[1]))
        for layer, step_size, threshold in zip(self.layers, self.step_sizes, self.thresholds, strict=True):
            residual = y - self.operator.A(x)
            x = soft_threshold(x + step_size * layer(residual), threshold.abs())
        return x


def _float_layer(operator: PhysicsOperator, structure: Structure) -> nn.Module:
    """A layer shaped like Aᵀ, compact where the structure is a rule: a mask is for the targets to name."""
    rows, columns = operator.shape
    if isinstance(structure, BlockDiagonal):
        return BlockDiagonalLinear(rows, columns, structure, bias=False)
    if isinstance(structure, Banded):
        return BandedLinear(rows, columns, structure.lower, structure.upper, bias=False)
    return nn.Linear(rows, columns, bias=False)
