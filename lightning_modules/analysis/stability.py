r"""How far the iterates move with y, with A and with one flipped sign, layer by layer: bounds beside what was found.

The iteration is x_{k+1} = soft(x_k + g_k W_k (y - A x_k), θ_k), x_0 = 0. Soft-thresholding is nonexpansive; with
T_k = ‖I - g_k W_k A‖₂, of each block for itself, and y, A or W changed,

- *y by δ*: ‖x'_{k+1} - x_{k+1}‖ ≤ T_k ‖x'_k - x_k‖ + ‖g_k W_k‖ ‖δ‖, so that the gain L_k in ‖x'_k - x_k‖ ≤ L_k ‖δ‖ has
  L_0 = 0 and L_{k+1} = T_k L_k + ‖g_k W_k‖. Beside it: the largest ‖∂x_k / ∂y‖₂ at the examples, exactly: with D the
  diagonal matrix of the entries that are not thresholded, J_{k+1} = D ((I - g_k W_k A) J_k + g_k W_k).
- *A by Δ with ‖Δ‖₂ ≤ ε, y as it was*: the change of the argument is (I - g W (A + Δ)) (x'_k - x_k) - g W Δ x_k, hence
  d_{k+1} = (T_k + ε ‖g_k W_k‖) d_k + ε ‖g_k W_k‖ ‖x_k‖. Beside it: the largest change for the worst Δ found, by ascent:
  of the linear maximum over ‖Δ‖₂ ≤ ε of ⟨v, x'_K - x_K⟩, with v the direction in which the output moved before. That
  maximum is ε times the polar factor of the gradient.
- *the sign of one entry w of W_k flipped, in column j*: x_{k+1} moves by at most 2 |g_k w r_j| with r = y - A x_k,
  and what follows multiplies that by T_{k+1} ... T_{K-1}. Beside it: the largest change of the output over the
  flips that change x_{k+1} most.

Bounds of A and of flips are those of the examples, with their x_k and r. They multiply worst cases that no single
direction attains in all layers, and grow with the depth where T_k > 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.analysis.unrolled import Unrolled, multiply
from pibinn_plugin.tables import text_table

__all__ = ["Stability", "stability"]

_STARTS, _ASCENTS = 3, 6
_FLIPS = 128  # of each layer, block and example
_LARGEST_BATCH = 1 << 18  # entries of all Jacobians that are held at one time


@dataclass(frozen=True, eq=False)
class Stability:
    """Bounds and what was found, worst block and example of each layer: five tensors of shape ``(layers,)`` each.

    Args:
        measurements_bound: L_k, per unit of the change of y.
        measurements: the largest ‖∂x_k / ∂y‖₂.
        operator_bound: d_k over the largest ‖x_K‖ of the examples, with ε a fraction of ‖A‖.
        operator: the largest change found over the same.
        flip_bound: of the output by a flip in the layer, over the same.
        flip: the largest change found over the same.
        fraction: ε / ‖A‖₂.
        examples: how many.
    """

    measurements_bound: Tensor
    measurements: Tensor
    operator_bound: Tensor
    operator: Tensor
    flip_bound: Tensor
    flip: Tensor
    fraction: float
    examples: int

    def __str__(self) -> str:
        columns = (
            self.measurements_bound, self.measurements, self.operator_bound, self.operator, self.flip_bound, self.flip
        )  # fmt: skip
        rows = [
            [str(layer + 1), *(f"{column[layer]:.4g}" for column in columns)] for layer in range(len(self.measurements))
        ]
        header = ("layer", "y: at most", "y: found", "A: at most", "A: found", "flip: at most", "flip: found")
        return text_table(header, rows) + (
            f"Worst block of {self.examples} test examples. y: change of x after the layer for a change of y of length "
            f"1.\nA: change of x after the layer, for A changed by {self.fraction:g} of its norm. flip: change of the "
            "output by one\nflipped sign in the layer. The last two over the length of the longest output of a block. "
            "found: a lower bound\nof the worst case. Derivation: analysis/stability.py.\n"
        )


def stability(unrolled: Unrolled, y: Tensor, fraction: float = 0.01) -> Stability:
    """Bound and search how far the iterates of some examples move.

    Args:
        unrolled: with thresholds.
        y: measurements, shape ``(examples, blocks, m)``; the first few are used, by the size of the problem.
        fraction: of ‖A‖₂ of each block, by which A is changed.

    Example:
        >>> unrolled = Unrolled(torch.eye(3)[None], torch.eye(3)[None], torch.tensor([0.5, 0.5]), torch.zeros(2))
        >>> report = stability(unrolled, torch.ones(1, 1, 3))
        >>> report.measurements_bound.tolist(), report.measurements.tolist()
        ([0.5, 0.75], [0.5, 0.75])
    """
    blocks, m, n = unrolled.operator.shape
    y = y[: max(1, _LARGEST_BATCH // (blocks * m * n))].detach().to("cpu", torch.float64)
    iterates = unrolled.run(y)
    identity = torch.eye(n, dtype=torch.float64)
    gains = unrolled.step_sizes[:, None, None, None] * unrolled.weights
    spectral = torch.stack([torch.linalg.matrix_norm(identity - gain @ unrolled.operator, 2) for gain in gains])
    sizes = torch.stack([torch.linalg.matrix_norm(gain, 2) for gain in gains])
    radius = fraction * torch.linalg.matrix_norm(unrolled.operator, 2)
    longest = iterates[-1].norm(dim=-1).amax().clamp_min(torch.finfo(torch.float64).tiny)
    lipschitz, moved = torch.zeros(blocks, dtype=torch.float64), torch.zeros(len(y), blocks, dtype=torch.float64)
    of_y, of_operator = [], []
    for layer in range(len(gains)):
        moved = (spectral[layer] + radius * sizes[layer]) * moved + radius * sizes[layer] * iterates[layer].norm(dim=-1)
        lipschitz = spectral[layer] * lipschitz + sizes[layer]
        of_y.append(lipschitz.max())
        of_operator.append(moved.max() / longest)
    flips = [_flips(unrolled, y, iterates, layer, spectral) for layer in range(len(gains))]
    return Stability(
        torch.stack(of_y),
        _jacobians(unrolled, y, iterates),
        torch.stack(of_operator),
        _worst_operator(unrolled, y, iterates, radius) / longest,
        torch.stack([bound for bound, _ in flips]) / longest,
        torch.stack([found for _, found in flips]) / longest,
        fraction,
        len(y),
    )


def _jacobians(unrolled: Unrolled, y: Tensor, iterates: Tensor) -> Tensor:
    """The largest ‖∂x_k / ∂y‖₂ of each layer."""
    blocks, m, n = unrolled.operator.shape
    jacobian = torch.zeros(len(y), blocks, n, m, dtype=torch.float64)
    norms = []
    for layer, (weight, step_size) in enumerate(zip(unrolled.weights, unrolled.step_sizes, strict=True)):
        gain = step_size * weight
        kept = (iterates[layer + 1] != 0)[..., None]
        jacobian = kept * (jacobian - gain @ (unrolled.operator @ jacobian) + gain)
        norms.append(torch.linalg.matrix_norm(jacobian, 2).max())
    return torch.stack(norms)


def _worst_operator(unrolled: Unrolled, y: Tensor, iterates: Tensor, radius: Tensor) -> Tensor:
    """The largest change of each iterate, of operators whose change moves the output far: one for each example."""
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(len(iterates) - 1, dtype=torch.float64)
    for _ in range(_STARTS):
        direction = torch.randn(iterates[-1].shape, generator=generator, dtype=torch.float64)
        change = torch.zeros(len(y), *unrolled.operator.shape, dtype=torch.float64)
        for _ in range(_ASCENTS):
            change = change.requires_grad_()
            output = _run(unrolled, y, unrolled.operator + change)[-1]
            (gradient,) = torch.autograd.grad((direction * output).sum(), change)
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            change = radius[:, None, None] * (left @ right)
            moved = _run(unrolled, y, unrolled.operator + change) - iterates
            worst = torch.maximum(worst, moved[1:].norm(dim=-1).amax((1, 2)))
            direction = moved[-1]
    return worst


def _run(unrolled: Unrolled, y: Tensor, operators: Tensor) -> Tensor:
    """The iterates with another operator for each example, differentiable in it."""
    x = torch.zeros(*y.shape[:-1], operators.shape[-1], dtype=torch.float64)
    iterates = [x]
    for layer in range(len(unrolled.step_sizes)):
        x = _step(unrolled, layer, x, y - (operators @ x[..., None])[..., 0])
        iterates.append(x)
    return torch.stack(iterates)


def _step(unrolled: Unrolled, layer: int, x: Tensor, residual: Tensor) -> Tensor:
    assert unrolled.thresholds is not None  # what was run has them
    u = x + unrolled.step_sizes[layer] * multiply(unrolled.weights[layer], residual)
    return u.sign() * (u.abs() - unrolled.thresholds[layer]).clamp_min(0)


def _flips(unrolled: Unrolled, y: Tensor, iterates: Tensor, layer: int, spectral: Tensor) -> tuple[Tensor, Tensor]:
    """The bound and the largest change found of the output by a flip in a layer."""
    assert unrolled.thresholds is not None
    weight, step_size, threshold = (
        values[layer] for values in (unrolled.weights, unrolled.step_sizes, unrolled.thresholds)
    )
    residual = y - multiply(unrolled.operator, iterates[layer])
    # Of u_i, by the flip of entry (i, j), shape (examples, blocks, n, m).
    change = -2 * step_size * weight * residual[..., None, :]
    bound = (change.abs().amax((-2, -1)) * spectral[layer + 1 :].prod(0)).max()
    u = (iterates[layer] + step_size * multiply(weight, residual))[..., None]
    after = (u + change).sign() * ((u + change).abs() - threshold).clamp_min(0) - iterates[layer + 1][..., None]
    immediate = after.flatten(-2)
    chosen = immediate.abs().topk(min(_FLIPS, immediate.shape[-1]), dim=-1).indices
    row = chosen // weight.shape[-1]
    # (flips, examples, blocks, n)
    start = iterates[layer + 1].expand(chosen.shape[-1], -1, -1, -1).clone()
    start.scatter_add_(-1, row.movedim(-1, 0)[..., None], immediate.gather(-1, chosen).movedim(-1, 0)[..., None])
    for following in range(layer + 1, len(unrolled.step_sizes)):
        start = _step(unrolled, following, start, y - multiply(unrolled.operator, start))
    return bound, (start - iterates[-1]).norm(dim=-1).max()
