"""CoupledISTA: unrolled ISTA with a known operator and learned weights in place of its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.operators import PhysicsOperator, operator_blocks, spectral_norm
from lightning_modules.solvers.proximal import soft_threshold
from lightning_modules.solvers.structured_layer import structured_layer
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["CoupledISTA"]


@records_arguments
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
        adjoint = operator_blocks(operator).mT
        self.layers = nn.ModuleList(structured_layer(adjoint) for _ in range(layers))
        self.step_sizes = nn.Parameter(torch.full((layers,), 1 / spectral_norm(operator) ** 2))
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
