"""LISTA: unrolled ISTA with two free weights a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.operators import PhysicsOperator, operator_blocks, spectral_norm
from lightning_modules.operators.base import check_size
from lightning_modules.solvers.proximal import soft_threshold
from lightning_modules.solvers.structured_layer import structured_layer
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["LISTA"]


@records_arguments
class LISTA(nn.Module):
    r"""Sparse recovery from y = A x + noise by K layers with two weights and a threshold each.

    .. math:: x \leftarrow \mathrm{soft}(g_k W_k y + s_k S_k x, |\theta_k|), \quad k = 1 \dots K,

    from x = 0; the first layer has no S (Gregor and LeCun, "Learning Fast Approximations of Sparse Coding", ICML 2010,
    here with weights of its own in each layer). The operator is not used but to start: W at Aᵀ and S at a multiple of
    I - AᵀA/L of the same mean magnitude, for which the step sizes g and s make up. So the untrained solver is ISTA, and
    weights of one magnitude can share one scale. Blocks of the physics stay blocks of both weights.

    The diagonal dominates I - AᵀA/L, which one-bit weights cannot show: `CoupledISTA` leaves it to the identity, and is
    the better form where A is known.

    Args:
        operator: A, with methods ``A`` and ``A_adjoint`` and a ``shape``.
        layers: K.

    Raises:
        ValueError: fewer than one layer; or, by ``forward``, measurements of another size than the operator's.

    Example:
        >>> from lightning_modules.operators import SignBlocks
        >>> solver = LISTA(SignBlocks(blocks=2, rows=4, columns=8), layers=3)
        >>> solver.input_layers[0].weight.shape, solver.state_layers[0].weight.shape, solver(torch.zeros(5, 8)).shape
        (torch.Size([2, 8, 4]), torch.Size([2, 8, 8]), torch.Size([5, 16]))
    """

    def __init__(self, operator: PhysicsOperator, layers: int = 12) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers={layers}: an unrolled solver has at least one")
        self.shape = operator.shape
        step_size = 1 / spectral_norm(operator) ** 2
        blocks = operator_blocks(operator)
        adjoint = blocks.mT
        state = torch.eye(blocks.shape[-1], device=blocks.device) - step_size * adjoint @ blocks
        ratio = _mean_magnitude(state) / _mean_magnitude(adjoint)
        self.input_layers = nn.ModuleList(structured_layer(adjoint) for _ in range(layers))
        self.state_layers = nn.ModuleList(structured_layer(state / ratio) for _ in range(layers - 1))
        self.input_step_sizes = nn.Parameter(torch.full((layers,), step_size))
        self.state_step_sizes = nn.Parameter(torch.full((layers - 1,), ratio))
        self.thresholds = nn.Parameter(torch.full((layers,), 0.05))

    def forward(self, y: Tensor) -> Tensor:
        """Recover the unknowns.

        Args:
            y: measurements, shape ``(..., measurements)``.

        Returns:
            The estimate, shape ``(..., unknowns)``.
        """
        check_size(y, self.shape[0], "y")
        x = soft_threshold(self.input_step_sizes[0] * self.input_layers[0](y), self.thresholds[0].abs())
        for number, state_layer in enumerate(self.state_layers, start=1):
            of_y = self.input_step_sizes[number] * self.input_layers[number](y)
            of_x = self.state_step_sizes[number - 1] * state_layer(x)
            x = soft_threshold(of_y + of_x, self.thresholds[number].abs())
        return x


def _mean_magnitude(blocks: Tensor) -> float:
    return float(blocks.abs().sum() / blocks.count_nonzero())
