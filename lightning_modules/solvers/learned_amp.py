"""LearnedAMP: approximate message passing with a known operator and a learned weight in each layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.operators import BlockOperator, PhysicsOperator, operator_blocks
from lightning_modules.solvers.message_passing import MessagePassing
from lightning_modules.solvers.structured_layer import structured_layer
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["LearnedAMP"]

# Of the mean eigenvalue of A Aᵀ: keeps its inverse from magnifying noise.
PSEUDO_INVERSE_RIDGE = 0.025
# The first step size, where columns of A and of what stands for it have inner products of 1.
START = 0.35


@records_arguments
class LearnedAMP(nn.Module):
    r"""Sparse recovery from y = A x + noise with A known, weights W_k and step sizes g_k and h_k, K iterations.

    `MessagePassing` with the correction :math:`g_k W_k r + h_k A^T r`, whose two terms ``correction`` chooses from:
    ``"learned"`` weights alone (Borgerding, Schniter and Rangan, "AMP-Inspired Deep Networks for Sparse Linear Inverse
    Problems", IEEE Trans. Signal Processing 65, 2017), ``"physics"`` alone (no weights, only scalars), or ``"both"``,
    where the weights correct what the physics leaves. W_k starts at Aᵀ and keeps the structure of Aᵀ.

    Args:
        operator: A, with methods ``A`` and ``A_adjoint`` and a ``shape``.
        layers: K.
        correction: ``"learned"``, ``"physics"`` or ``"both"``.
        pseudo_inverse: put :math:`(A A^T + ρ I)^{-1} A`, each column scaled to the inner product 1 with that of A, in
            the place of A in the physics term, and, on the support of Aᵀ, at the start of the weights.

    Raises:
        ValueError: fewer than one layer, an unknown correction; or, by ``forward``, measurements of another size.

    Example:
        >>> from lightning_modules.operators import SignBlocks
        >>> solver = LearnedAMP(SignBlocks(blocks=2, rows=4, columns=8), layers=3)
        >>> solver.layers[0].weight.shape, solver(torch.zeros(5, 8)).shape
        (torch.Size([2, 8, 4]), torch.Size([5, 16]))
    """

    def __init__(
        self,
        operator: PhysicsOperator,
        layers: int = 12,
        correction: Literal["learned", "physics", "both"] = "learned",
        pseudo_inverse: bool = False,
    ) -> None:
        super().__init__()
        if correction not in ("learned", "physics", "both"):
            raise ValueError(f"correction={correction!r}: expected 'learned', 'physics' or 'both'")
        self.operator = operator
        blocks = operator_blocks(operator)
        physics_blocks = _pseudo_inverse(blocks) if pseudo_inverse else blocks
        self.physics: PhysicsOperator = BlockOperator(physics_blocks) if pseudo_inverse else operator
        self.iteration = MessagePassing(layers, len(blocks))
        step_size = START / float((physics_blocks * blocks).sum(dim=1).mean())
        start = torch.where(blocks != 0, physics_blocks, 0.0).mT  # a pseudo-inverse fills zeros that weights must keep
        # In the beginning, what both terms do together is what one would do alone.
        learned, physical = {"learned": (1.0, 0.0), "physics": (0.0, 1.0), "both": (0.1, 0.9)}[correction]
        self.layers = nn.ModuleList()
        if learned:
            self.layers.extend(structured_layer(start) for _ in range(layers))
            self.step_sizes = nn.Parameter(torch.full((layers,), learned * step_size))
        if physical:
            self.physics_step_sizes = nn.Parameter(torch.full((layers,), physical * step_size))
        self.correction = correction

    def forward(self, y: Tensor) -> Tensor:
        """Recover the unknowns.

        Args:
            y: measurements, shape ``(batch, measurements)``.

        Returns:
            The estimate, shape ``(batch, unknowns)``.
        """
        measurements, unknowns = self.operator.shape
        if y.shape[-1] != measurements:
            raise ValueError(f"y has shape {tuple(y.shape)}; the operator gives {measurements} measurements")
        return self.iteration(y, unknowns, self.operator.A, self._correct)

    def _correct(self, k: int, residual: Tensor) -> Tensor:
        if self.correction == "learned":
            return self.step_sizes[k] * self.layers[k](residual)
        physical = self.physics_step_sizes[k] * self.physics.A_adjoint(residual)
        return physical if self.correction == "physics" else physical + self.step_sizes[k] * self.layers[k](residual)


@torch.no_grad()
def _pseudo_inverse(blocks: Tensor) -> Tensor:
    """Of the blocks of A: blocks of the same shape, whose adjoint is a regularised and rescaled pseudo-inverse of A."""
    gram = blocks @ blocks.mT
    ridge = PSEUDO_INVERSE_RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean()
    inverse = torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1], device=gram.device), blocks)
    agreement = (inverse * blocks).sum(dim=1, keepdim=True)
    return inverse / torch.where(agreement > 0, agreement, torch.ones_like(agreement))
