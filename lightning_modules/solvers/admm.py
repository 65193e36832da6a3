"""UnrolledADMM: the alternating direction method of multipliers with a learned weight in each iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.operators import PhysicsOperator, operator_blocks
from lightning_modules.operators.base import check_size
from lightning_modules.solvers.proximal import soft_threshold
from lightning_modules.solvers.structured_layer import structured_layer
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["UnrolledADMM"]


@records_arguments
class UnrolledADMM(nn.Module):
    r"""Sparse recovery from y = A x + noise by K iterations of ADMM for the lasso, with weights W_k.

    .. math::
        v = z - u, \quad x = v + g_k W_k (y - A v), \quad z \leftarrow \mathrm{soft}(x + u, |\theta_k|), \quad
        u \leftarrow u + h_k (x - z), \quad k = 1 \dots K,

    from z = u = 0; the estimate is z. The x-update of ADMM (Boyd et al., "Distributed Optimization and Statistical
    Learning via the Alternating Direction Method of Multipliers", 2011, section 6.4; unrolled by Yang et al., "Deep
    ADMM-Net for Compressive Sensing MRI", NeurIPS 2016) solves :math:`(A^T A + \rho I) x = A^T y + \rho v`. It is
    written by the matrix inversion lemma as a correction of v,

    .. math:: x = v + B (y - A v), \qquad B = A^T (A A^T + \rho I)^{-1},

    because a learned inverse of AᵀA + ρI is dominated by its diagonal, which one-bit weights cannot show: here the
    identity costs nothing, and the sign of a weight says which way a residual corrects an unknown. W starts at B and
    keeps the blocks of the physics. Without the multiplier (h = 0) it is half-quadratic splitting.

    Args:
        operator: A, with methods ``A`` and ``A_adjoint`` and a ``shape``.
        layers: K.
        penalty: ρ, of the augmented Lagrangian, above 0.

    Raises:
        ValueError: an argument out of range; or, by ``forward``, measurements of another size than the operator's.

    Example:
        >>> from lightning_modules.operators import SignBlocks
        >>> solver = UnrolledADMM(SignBlocks(blocks=2, rows=4, columns=8), layers=3)
        >>> solver.layers[0].weight.shape, solver(torch.zeros(5, 8)).shape
        (torch.Size([2, 8, 4]), torch.Size([5, 16]))
    """

    def __init__(self, operator: PhysicsOperator, layers: int = 12, penalty: float = 1.0) -> None:
        super().__init__()
        if layers < 1 or not penalty > 0:
            raise ValueError(f"layers={layers}, penalty={penalty}: expected at least one layer and a penalty above 0")
        self.operator = operator
        blocks = operator_blocks(operator)
        regularized = blocks @ blocks.mT + penalty * torch.eye(blocks.shape[1], device=blocks.device)
        correction = torch.linalg.solve(regularized, blocks).mT
        self.layers = nn.ModuleList(structured_layer(correction) for _ in range(layers))
        self.step_sizes = nn.Parameter(torch.ones(layers))
        self.dual_step_sizes = nn.Parameter(torch.ones(layers - 1))
        self.thresholds = nn.Parameter(torch.full((layers,), 0.05))

    def forward(self, y: Tensor) -> Tensor:
        """Recover the unknowns.

        Args:
            y: measurements, shape ``(..., measurements)``.

        Returns:
            The estimate, shape ``(..., unknowns)``.
        """
        x = self.step_sizes[0] * self.layers[0](check_size(y, self.operator.shape[0], "y"))
        z, u = soft_threshold(x, self.thresholds[0].abs()), torch.zeros_like(x)
        for number, dual_step_size in enumerate(self.dual_step_sizes, start=1):
            u = u + dual_step_size * (x - z)
            v = z - u
            x = v + self.step_sizes[number] * self.layers[number](y - self.operator.A(v))
            z = soft_threshold(x + u, self.thresholds[number].abs())
        return z
