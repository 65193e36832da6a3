"""ISTA and FISTA, with nothing to learn: what every unrolled solver is measured against."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lightning_modules.operators import PhysicsOperator, spectral_norm
from lightning_modules.operators.base import check_size
from lightning_modules.solvers.proximal import soft_threshold
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["FISTA", "ISTA"]


@records_arguments
class ISTA(nn.Module):
    r"""The iterative shrinkage-thresholding algorithm for the lasso, from x = 0.

    .. math::
        \min_x \tfrac12 \lVert y - A x \rVert^2 + \lambda \lVert x \rVert_1, \qquad
        x \leftarrow \mathrm{soft}\left(x + \tfrac1L A^T (y - A x), \tfrac{\lambda}{L}\right),
        \quad L = \lVert A \rVert_2^2

    The objective never increases (Daubechies, Defrise and De Mol, "An iterative thresholding algorithm for linear
    inverse problems with a sparsity constraint", Communications on Pure and Applied Mathematics 57, 2004). The penalty
    is a fraction of that from which on the solution is zero: :math:`\lambda = \rho \lVert A^T y \rVert_\infty`, for
    each sample.

    Args:
        operator: A, with methods ``A`` and ``A_adjoint`` and a ``shape``.
        iterations: at least one.
        regularization: ρ, above 0 and at most 1.

    Raises:
        ValueError: an argument out of range; or, by ``forward``, measurements of another size than the operator's.

    Example:
        >>> import torch
        >>> from lightning_modules.operators import DenseOperator
        >>> ISTA(DenseOperator(torch.eye(2)), iterations=1, regularization=0.5)(torch.tensor([[4.0, 1.0]]))
        tensor([[2., 0.]])
    """

    def __init__(self, operator: PhysicsOperator, iterations: int = 16, regularization: float = 0.1) -> None:
        super().__init__()
        if iterations < 1 or not 0 < regularization <= 1:
            raise ValueError(
                f"iterations={iterations}, regularization={regularization}: expected at least one iteration, and a "
                f"fraction above 0 and at most 1"
            )
        self.operator, self.iterations, self.regularization = operator, iterations, regularization
        self.step_size = 1 / spectral_norm(operator) ** 2

    def forward(self, y: Tensor) -> Tensor:
        """Recover the unknowns.

        Args:
            y: measurements, shape ``(..., measurements)``.

        Returns:
            The estimate, shape ``(..., unknowns)``.
        """
        threshold = self._threshold(y)
        x = y.new_zeros((*y.shape[:-1], self.operator.shape[1]))
        for _ in range(self.iterations):
            x = self._descend(x, y, threshold)
        return x

    def _threshold(self, y: Tensor) -> Tensor:
        largest = self.operator.A_adjoint(check_size(y, self.operator.shape[0], "y")).abs().amax(-1, keepdim=True)
        return self.step_size * self.regularization * largest

    def _descend(self, x: Tensor, y: Tensor, threshold: Tensor) -> Tensor:
        gradient = self.operator.A_adjoint(y - self.operator.A(x))
        return soft_threshold(x + self.step_size * gradient, threshold)


@records_arguments
class FISTA(ISTA):
    r"""ISTA with Nesterov's momentum, for the same objective F.

    .. math::
        x_k = \mathrm{soft}\left(z_k + \tfrac1L A^T (y - A z_k), \tfrac{\lambda}{L}\right), \quad
        t_{k+1} = \frac{1 + \sqrt{1 + 4 t_k^2}}{2}, \quad
        z_{k+1} = x_k + \frac{t_k - 1}{t_{k+1}} (x_k - x_{k-1})

    from :math:`x_0 = z_1 = 0, t_1 = 1`, with :math:`F(x_k) - F^* \le 2 L \lVert x_0 - x^* \rVert^2 / (k + 1)^2`
    (Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", SIAM Journal on
    Imaging Sciences 2, 2009, Theorem 4.4). Arguments and errors are those of `ISTA`.

    Example:
        >>> import torch
        >>> from lightning_modules.operators import DenseOperator
        >>> FISTA(DenseOperator(torch.eye(2)), iterations=3, regularization=0.5)(torch.tensor([[4.0, 1.0]]))
        tensor([[2., 0.]])
    """

    def forward(self, y: Tensor) -> Tensor:
        """Recover the unknowns, as `ISTA.forward` does."""
        threshold = self._threshold(y)
        x = z = y.new_zeros((*y.shape[:-1], self.operator.shape[1]))
        t = 1.0
        for _ in range(self.iterations):
            previous, x = x, self._descend(z, y, threshold)
            t, t_before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            z = x + (t_before - 1) / t * (x - previous)
        return x
