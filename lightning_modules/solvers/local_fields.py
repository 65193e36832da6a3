"""LocalFields: what the neighbours of each spin on a torus say of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["LocalFields", "local_fields"]


def local_fields(spins: Tensor, couplings: Tensor) -> Tensor:
    r"""The fields :math:`h_i = \sum_j W_{ij} s_j` of spins whose couplings W join neighbours on a torus.

    Each edge of the lattice has one coupling, which both its ends feel: W is symmetric without being stored twice.

    Args:
        spins: shape ``(..., rows, columns)``.
        couplings: shape ``(2, rows, columns)``, of each site that to its right neighbour and that to the one below;
            those of the last column lead to the first, those of the last row to the top one.

    Returns:
        h, in the shape of the spins.

    Example:
        >>> couplings = torch.zeros(2, 4, 4)
        >>> couplings[0, 1, 3] = 0.5  # joins the last site of the second row to the first
        >>> single = torch.zeros(4, 4)
        >>> single[1, 0] = -1.0
        >>> local_fields(single, couplings)[1]
        tensor([ 0.0000,  0.0000,  0.0000, -0.5000])
    """
    right, down = couplings
    across = right * spins.roll(-1, -1) + (right * spins).roll(1, -1)
    return across + down * spins.roll(-1, -2) + (down * spins).roll(1, -2)


@records_arguments
class LocalFields(nn.Module):
    r"""The field of each spin on a torus from all others; the couplings are the one weight, a value for each edge.

    The spin glass of Edwards and Anderson has the couplings :math:`\pm J` and the energy
    :math:`-\sum_{ij} J_{ij} s_i s_j` over edges; at the inverse temperature β a spin is 1 with the probability
    :math:`1 / (1 + e^{-2 h_i})`, where :math:`h = W s` and :math:`W = β J`. One bit for each edge and the one scale
    λ = β J say all of it.

    Args:
        size: rows and columns of the torus, even and at least 4.

    Raises:
        ValueError: another size; or, by ``forward``, spins of another lattice.

    Example:
        >>> solver = LocalFields(size=4)
        >>> solver.weight.shape, solver(torch.ones(5, 4, 4)).shape
        (torch.Size([2, 4, 4]), torch.Size([5, 4, 4]))
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 4 or size % 2:
            raise ValueError(
                f"size is {size}: the two halves of a checkerboard need an even number of rows and columns, and "
                f"neighbours joined by one edge at least 4"
            )
        self.size = size
        self.weight = nn.Parameter(0.1 * torch.randn(2, size, size))

    def forward(self, spins: Tensor) -> Tensor:
        """The local fields.

        Args:
            spins: shape ``(batch, size, size)``.

        Returns:
            h, shape ``(batch, size, size)``.
        """
        if spins.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"the spins have shape {tuple(spins.shape)}; expected (batch, {self.size}, {self.size}), those of the "
                f"lattice that the couplings belong to"
            )
        return local_fields(spins, self.weight)
