"""The iteration that `LearnedAMP` and `CalibratedAMP` share: approximate message passing with a firm threshold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_modules.solvers.proximal import firm_threshold

__all__ = ["MessagePassing"]


class MessagePassing(nn.Module):
    r"""K iterations for y = A x + noise with sparse x, from x = 0, given A and K corrections of the residual.

    .. math::
        z &= x + \mu_k (x - x_-) \\
        r &= y - A z + b_k \tfrac{\lVert x \rVert_0}{m} r_- \\
        u &= z + \mathrm{correction}_k(r) \\
        x &= \mathrm{sign}(u) \min\left(|u|, \tfrac{1 + w}{w} (|u| - t)_+\right), \quad
        t = 0.2 |\theta_k| + |c_k| \, \mathrm{rms}(r), \quad w = 10 |w_k| + 0.01

    The term with b is Onsager's (Donoho, Maleki and Montanari, "Message-passing algorithms for compressed sensing",
    PNAS 106, 2009), the threshold follows the residual (Borgerding, Schniter and Rangan, "AMP-Inspired Deep Networks
    for Sparse Linear Inverse Problems", IEEE Trans. Signal Processing 65, 2017). ‖x‖₀ and rms(r) are taken in each
    sample and block. The start is for columns of A of about unit norm and unknowns of about unit size.

    Args:
        layers: K.
        blocks: equal blocks of y and of x that do not depend on each other.

    Raises:
        ValueError: fewer than one layer or block.

    Example:
        >>> iteration = MessagePassing(layers=3, blocks=2)
        >>> iteration(torch.ones(5, 4), 4, lambda x: x, lambda k, residual: residual).shape
        torch.Size([5, 4])
    """

    def __init__(self, layers: int, blocks: int = 1) -> None:
        super().__init__()
        if layers < 1 or blocks < 1:
            raise ValueError(f"layers={layers}, blocks={blocks}: both are at least 1")
        self.layers, self.blocks = layers, blocks
        self.momenta = nn.Parameter(torch.zeros(layers))
        self.onsager = nn.Parameter(torch.ones(layers))
        self.thresholds = nn.Parameter(torch.full((layers,), 0.05))
        self.residual_thresholds = nn.Parameter(torch.full((layers,), 0.5))
        self.widths = nn.Parameter(torch.full((layers,), 0.3))

    def forward(
        self,
        y: Tensor,
        unknowns: int,
        operator: Callable[[Tensor], Tensor],
        correction: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Recover the unknowns.

        Args:
            y: measurements, shape ``(batch, measurements)``.
            unknowns: their number n.
            operator: A, from ``(batch, n)`` to ``(batch, measurements)``.
            correction: from k and the residual, shape ``(batch, measurements)``, to a step, shape ``(batch, n)``.

        Returns:
            The estimate, shape ``(batch, n)``.
        """
        previous = x = y.new_zeros((*y.shape[:-1], unknowns))
        residual = y
        for k in range(self.layers):
            z = x
            if k > 0:
                z = x + self.momenta[k] * (x - previous)
                residual = y - operator(z) + self.onsager[k] * self._onsager_term(x, residual)
            previous, x = x, self._shrink(k, z + correction(k, residual), residual)
        return x

    def _onsager_term(self, x: Tensor, residual: Tensor) -> Tensor:
        x, residual = self._in_blocks(x), self._in_blocks(residual)
        nonzeros = (x != 0).to(x.dtype).sum(-1, keepdim=True)
        return (nonzeros / residual.shape[-1] * residual).flatten(-2)

    def _shrink(self, k: int, u: Tensor, residual: Tensor) -> Tensor:
        # The floor keeps the derivative of the root finite where a residual vanishes.
        deviation = self._in_blocks(residual).square().mean(-1, keepdim=True).clamp_min(1e-8).sqrt()
        threshold = 0.2 * self.thresholds[k].abs() + self.residual_thresholds[k].abs() * deviation
        return firm_threshold(self._in_blocks(u), threshold, 10 * self.widths[k].abs() + 0.01).flatten(-2)

    def _in_blocks(self, signal: Tensor) -> Tensor:
        return signal.unflatten(-1, (self.blocks, -1))
