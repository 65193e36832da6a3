"""The iteration that the analyses are about, as plain tensors, and how to read it off a trained solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pibinn_plugin.errors import PIBiNNError

__all__ = ["Unrolled", "multiply", "read_solver"]

_FORM = "certificates are for solvers of the form x ← soft(x + g W (y - A x), θ), such as CoupledISTA"
LARGEST_DENSE = 1 << 22  # elements of an operator that is made one block: 32 MB, and as much for each layer


@dataclass(frozen=True, eq=False)
class Unrolled:
    """The iteration as plain tensors, in float64. Plain ISTA is ``weights=operator.mT``.

    Args:
        operator: the blocks of A, shape ``(blocks, m, n)``; one block for a dense A.
        weights: W_k, shape ``(layers, blocks, n, m)``, or ``(blocks, n, m)`` for a weight shared by all layers: the
            compact form of equal blocks, λ included.
        step_sizes: g_k, shape ``(layers,)``.
        thresholds: θ_k, shape ``(layers,)``, not negative. None for the smallest that satisfy the threshold condition.

    Raises:
        ValueError: shapes that do not fit, an entry that is not finite, or a negative threshold.

    Example:
        >>> identity = torch.eye(3)[None]
        >>> Unrolled(identity, identity, torch.ones(2), torch.zeros(2)).run(torch.ones(1, 1, 3))[-1].tolist()
        [[[1.0, 1.0, 1.0]]]
    """

    operator: Tensor
    weights: Tensor
    step_sizes: Tensor
    thresholds: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("operator", "weights", "step_sizes", "thresholds"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, value.detach().to("cpu", torch.float64))
                if not getattr(self, name).isfinite().all():
                    raise PIBiNNError(f"{name} has an entry that is not finite")
        if self.operator.dim() != 3 or self.step_sizes.dim() != 1 or not len(self.step_sizes):
            raise ValueError(
                "expected an operator (blocks, m, n) and step sizes (layers,); "
                f"got {tuple(self.operator.shape)} and {tuple(self.step_sizes.shape)}"
            )
        if self.weights.dim() == 3:
            object.__setattr__(self, "weights", self.weights.expand(len(self.step_sizes), -1, -1, -1))
        blocks, m, n = self.operator.shape
        expected = (len(self.step_sizes), blocks, n, m)
        if tuple(self.weights.shape) != expected:
            raise ValueError(f"expected weights (layers, blocks, n, m) = {expected}; got {tuple(self.weights.shape)}")
        if self.thresholds is not None and (
            self.thresholds.shape != self.step_sizes.shape or self.thresholds.min() < 0
        ):
            raise ValueError(
                f"expected {len(self.step_sizes)} thresholds of at least 0; got {self.thresholds.tolist()}"
            )

    def run(self, y: Tensor) -> Tensor:
        """x_0, x_1, ... for measurements y.

        Args:
            y: shape ``(batch, blocks, m)``.

        Returns:
            shape ``(layers + 1, batch, blocks, n)``.

        Raises:
            ValueError: there are no thresholds.
        """
        if self.thresholds is None:
            raise ValueError("the iteration has no thresholds; take those of its certificate")
        iterates = [y.new_zeros((*y.shape[:-1], self.operator.shape[-1]), dtype=torch.float64)]
        for weight, step_size, threshold in zip(self.weights, self.step_sizes, self.thresholds, strict=True):
            residual = y - multiply(self.operator, iterates[-1])
            u = iterates[-1] + step_size * multiply(weight, residual)
            iterates.append(u.sign() * (u.abs() - threshold).clamp_min(0))
        return torch.stack(iterates)


def read_solver(solver: Any) -> Unrolled:
    """The iteration of a trained solver: float, prepared (any scheme) or packed.

    The solver has the attributes ``operator`` (with ``A``, ``shape``, and ``blocks`` of shape ``(blocks, m, n)`` where
    it is block-diagonal; without, A is one block), ``layers`` (each maps ``(batch, measurements)`` to
    ``(batch, unknowns)`` by its weight), ``step_sizes`` and ``thresholds`` (their magnitudes are used). Layers are
    probed, not parsed, and the solver's own output is compared with that of the iteration. Where a weight does not keep
    to the operator's blocks (another order, uneven blocks, a mask), all is one block, up to 4 million elements.

    Args:
        solver: such as ``lightning_modules.solvers.coupled_ista.CoupledISTA``.

    Raises:
        PIBiNNError: an attribute is missing, a layer is not linear, or needs one block that is too large, or the
            solver computes something else than the iteration of this module.

    Example:
        >>> class Ista(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.ModuleList([nn.Linear(3, 5, bias=False)])
        ...         self.step_sizes, self.thresholds = torch.ones(1), torch.zeros(1)
        ...         self.operator = type("Operator", (), {"blocks": torch.ones(1, 3, 5)})
        ...     def forward(self, y):
        ...         return self.layers[0](y)
        >>> read_solver(Ista()).weights.shape
        torch.Size([1, 1, 5, 3])
    """
    missing = [name for name in ("operator", "layers", "step_sizes", "thresholds") if not hasattr(solver, name)]
    if missing:
        raise PIBiNNError(f"{type(solver).__name__} has no {', '.join(missing)}: {_FORM}")
    with torch.no_grad():
        operator = getattr(solver.operator, "blocks", None)
        if operator is None:
            units = torch.eye(solver.operator.shape[1], dtype=solver.step_sizes.dtype, device=solver.step_sizes.device)
            operator = solver.operator.A(units).mT[None]
        operator, weights = _probed(solver, operator)
        unrolled = Unrolled(operator, weights, solver.step_sizes, solver.thresholds.abs())
        y = _random_measurements(solver, operator)
        expected = unrolled.run(y.double().cpu().unflatten(-1, (operator.shape[0], -1)))[-1].flatten(-2)
        if not _agree(solver(y), expected):
            raise PIBiNNError(f"{type(solver).__name__} computes something else: {_FORM}")
    return unrolled


def _probed(solver: Any, operator: Tensor) -> tuple[Tensor, Tensor]:
    """The operator and all weights in the operator's blocks, or as one block where a weight does not keep to them."""
    y = _random_measurements(solver, operator)
    weights = [_probe(layer, operator, y) for layer in solver.layers]
    unfit = [number for number, weight in enumerate(weights) if weight is None]
    if not unfit:
        return operator, torch.stack([weight for weight in weights if weight is not None])
    if len(operator) == 1:
        raise PIBiNNError(f"layer {unfit[0]} is not linear: {_FORM}")
    rows, columns = len(operator) * operator.shape[1], len(operator) * operator.shape[2]
    if rows * columns > LARGEST_DENSE:
        raise PIBiNNError(
            f"layer {unfit[0]} is not block-diagonal in the blocks of the operator, and {rows} x {columns} is too "
            f"large for one block: at most {LARGEST_DENSE:,} elements"
        )
    return _probed(solver, torch.block_diag(*operator)[None])


def _random_measurements(solver: Any, operator: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, operator.shape[0] * operator.shape[1], generator=generator).to(solver.step_sizes)


def _probe(layer: Any, operator: Tensor, y: Tensor) -> Tensor | None:
    """The blocks (blocks, n, m) of a layer's weight: each unit vector is fed to all blocks at once. None for others."""
    blocks, m, _ = operator.shape
    units = torch.eye(m, dtype=y.dtype, device=y.device).repeat(1, blocks)
    weight = layer(units).unflatten(-1, (blocks, -1)).permute(1, 2, 0)
    expected = multiply(weight.double(), y.double().unflatten(-1, (blocks, m))).flatten(-2)
    return weight if _agree(layer(y), expected) else None


def _agree(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 * float(expected.abs().max())
    return torch.allclose(actual.double().cpu(), expected.cpu(), rtol=1e-3, atol=tolerance)


def multiply(blocks: Tensor, x: Tensor) -> Tensor:
    """A block-diagonal matrix ``(blocks, rows, columns)`` times each ``x`` of shape ``(..., blocks, columns)``."""
    return torch.einsum("brc,...bc->...br", blocks, x)
