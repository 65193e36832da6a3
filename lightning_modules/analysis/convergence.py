r"""Does an unrolled ISTA converge: an error after each layer, certified from the weights.

The iteration starts at x_0 = 0 and has weights W_k (n × m), step sizes g_k and thresholds θ_k:

.. math:: x_{k+1} = \mathrm{soft}(x_k + g_k W_k (y - A x_k), \theta_k), \quad y = A x^* + \varepsilon,

with the error :math:`e_k = x_k - x^*`.

Constants of a layer, with :math:`G_k = g_k W_k A`:

.. math::
    d_k = \max_i |1 - G_{ii}|, \quad \mu_k = \max_{i \ne j} |G_{ij}|, \quad C_k = \max_i \|g_k W_k[i, :]\|_1,
    \quad \rho_k(s) = \max_{|S| = s} \|(I - G_k)_{SS}\|_{1 \to 1}.

For a one-bit row, ‖g_k W_k[i, :]‖₁ is |g_k| λ times its structural nonzeros. ρ_k(s) is the largest, over the columns j,
of |1 - G_jj| plus the s - 1 largest |G_ij|, i ≠ j: exact, cheap, and at most d_k + (s - 1) μ_k.

**Theorem.** Assume that x* has at most s nonzeros, ‖x*‖_∞ ≤ B, ‖ε‖_∞ ≤ σ. Let E_0 = s B. As long as

.. math:: \theta_k \ge \mu_k E_k + C_k \sigma \qquad \text{(threshold condition)}

held in all layers up to k, the support of x_{k+1} lies in that of x*, and ‖e_{k+1}‖₁ is at most

.. math:: E_{k+1} = \rho_k(s) E_k + s \theta_k + s C_k \sigma.

*Proof.* The argument u of the threshold satisfies u - x* = (I - G_k) e_k + g_k W_k ε, and e_k vanishes outside the
support S of x* (x_0 = 0 starts the induction). For i outside S, |u_i| ≤ Σ_{j ∈ S} |G_ij| |e_j| + C_k σ ≤ μ_k E_k +
C_k σ ≤ θ_k, which soft-thresholding sets to zero. For i in S, |soft(u_i) - u_i| ≤ θ_k gives |e_{k+1,i}| ≤
|1 - G_ii| |e_i| + Σ_{j ∈ S, j ≠ i} |G_ij| |e_j| + θ_k + C_k σ. The sum over i in S, column by column, is the bound. ∎

**Rate.** The threshold condition makes θ_k itself at least μ_k E_k, so that no admissible threshold gives less than

.. math:: E_{k+1} = (\rho_k(s) + s \mu_k) E_k + 2 s C_k \sigma.

Contraction means ρ_k(s) + s μ_k < 1; ρ_k(s) < 1 alone is not enough. With d_k = 0 and the coarser
ρ_k(s) = (s - 1) μ_k this is (2s - 1) μ_k < 1: the condition s < (1 + 1/μ)/2 of the source.

Where A and all W_k are block-diagonal, blocks are separate problems: each is certified with its own s. The theorem is
about exact arithmetic; a forward in float32 adds its rounding.

Source: Chen, Liu, Wang, Yin, "Theoretical Linear Convergence of Unfolded ISTA and Its Practical Weights and
Thresholds", NeurIPS 2018, Theorem 2, whose d_k is zero (weights normalised to G_ii = 1); d_k, ρ_k and the use of given
thresholds are added here by the same proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.analysis.unrolled import Unrolled
from pibinn_plugin.tables import text_table

__all__ = [
    "Certificate",
    "LayerConstants",
    "certify",
    "layer_constants",
]


@dataclass(frozen=True, eq=False)
class LayerConstants:
    """The constants of the theorem, one for each layer and block.

    Args:
        diagonal: d, shape ``(layers, blocks)``.
        coherence: μ, the same shape.
        noise_gain: C, the same shape.
        factors: ρ(s) for s = 0 ... n, shape ``(layers, blocks, n + 1)``; ρ(0) = 0.
    """

    diagonal: Tensor
    coherence: Tensor
    noise_gain: Tensor
    factors: Tensor

    @property
    def rates(self) -> Tensor:
        """ρ(s) + s μ for s = 0 ... n, shape ``(layers, blocks, n + 1)``."""
        return self.factors + torch.arange(self.factors.shape[-1]) * self.coherence[..., None]

    @property
    def largest_sparsity(self) -> Tensor:
        """The largest s with ρ(s) + s μ < 1, shape ``(layers, blocks)``; 0 where there is none."""
        return (self.rates < 1).sum(-1) - 1  # rates grow with s, from 0 at s = 0


def layer_constants(unrolled: Unrolled) -> LayerConstants:
    """Compute d, μ, C and ρ of each layer and block; time and memory of a layer go with blocks × n².

    Example:
        >>> operator = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])
        >>> constants = layer_constants(Unrolled(operator, torch.eye(2)[None], torch.ones(1)))
        >>> constants.coherence.item(), constants.largest_sparsity.item()
        (0.5, 1)
    """
    per_layer = [
        _constants(unrolled.operator, g * w) for g, w in zip(unrolled.step_sizes, unrolled.weights, strict=True)
    ]
    return LayerConstants(*(torch.stack(values) for values in zip(*per_layer, strict=True)))


def _constants(operator: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gain = weight @ operator
    diagonal = (1 - gain.diagonal(dim1=-2, dim2=-1)).abs()
    off_diagonal = (gain - torch.diag_embed(gain.diagonal(dim1=-2, dim2=-1))).abs()
    return (
        diagonal.amax(-1),
        off_diagonal.amax((-2, -1)),
        weight.abs().sum(-1).amax(-1),
        _column_factors(diagonal, off_diagonal),
    )


def _column_factors(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """ρ(s) for s = 0 ... n over the columns given.

    Args:
        diagonal: |1 - G_jj|, shape ``(..., columns)``.
        off_diagonal: |G_ij|, shape ``(..., n, columns)``, with zeros in place of the diagonal.

    Returns:
        shape ``(..., n + 1)``.
    """
    # Each column with its largest entries first; the diagonal's own zero comes last and is never counted.
    largest = off_diagonal.sort(dim=-2, descending=True).values[..., :-1, :]
    others = F.pad(largest, (0, 0, 1, 0)).cumsum(-2)  # row s - 1: the s - 1 largest
    return F.pad((diagonal[..., None, :] + others).amax(-1), (1, 0))


@dataclass(frozen=True, eq=False)
class Certificate:
    """What the theorem guarantees for every x* and ε that meet the assumptions; ``print`` shows it as a table.

    Args:
        constants: of each layer and block.
        sparsity: s of each block.
        amplitude: B, the bound of ‖x*‖_∞.
        noise: σ, the bound of ‖ε‖_∞.
        thresholds: θ, shape ``(layers,)``.
        condition: whether the threshold condition holds, shape ``(layers, blocks)``; False from the layer on where it
            fails first.
        errors: E_0, E_1, ..., shape ``(layers + 1, blocks)``; infinite where nothing is guaranteed.
    """

    constants: LayerConstants
    sparsity: tuple[int, ...]
    amplitude: float
    noise: float
    thresholds: Tensor
    condition: Tensor
    errors: Tensor

    @property
    def holds(self) -> bool:
        """Whether the error after the last layer is certified in every block."""
        return bool(self.condition.all())

    @property
    def rates(self) -> Tensor:
        """ρ(s) + s μ with the s of each block, shape ``(layers, blocks)``: below 1, the layer can contract."""
        index = torch.tensor(self.sparsity).expand(len(self.thresholds), -1)[..., None]
        return self.constants.rates.gather(-1, index).squeeze(-1)

    @property
    def largest_sparsity(self) -> int:
        """The largest s for which every layer contracts in every block."""
        return int(self.constants.largest_sparsity.min())

    @property
    def assumptions(self) -> str:
        """What the numbers rest on."""
        low, high = min(self.sparsity), max(self.sparsity)
        nonzeros = str(low) if low == high else f"{low} to {high}"
        return (
            f"Assumed: x0 = 0; y = A x* + noise with this A; in each block at most {nonzeros} nonzeros of x*;\n"
            f"|x*| <= {self.amplitude:g} and |noise| <= {self.noise:g} in every entry; exact arithmetic. "
            "Worst case over all such x* and noise."
        )

    def __str__(self) -> str:
        return text_table(_COLUMNS, [_layer_cells(self, k) for k in range(len(self.thresholds))]) + "\n".join(
            (_LEGEND, self._verdict(), self.assumptions)
        )

    def _verdict(self) -> str:
        if not self.holds:
            layer = int((~self.condition).any(-1).nonzero()[0]) + 1
            return (
                f"NOT certified: the threshold condition fails at layer {layer}; nothing is guaranteed from there on."
            )
        change = float(self.errors[-1].sum() / self.errors[0].sum()) if self.errors[0].sum() > 0 else 0.0
        vacuous = "" if change < 1 else " VACUOUS: no better than the zero vector."
        return f"Certified: the error ends at most {change:.3g} times where it starts.{vacuous}"


_COLUMNS = ("layer", "θ", "condition", "d", "μ", "C", "ρ(s)", "rate", "largest s", "certified ‖e‖₁")
_LEGEND = (
    "Worst block of each layer; errors are sums over the blocks. condition: blocks where θ >= μ E + C σ, E the error\n"
    "certified before the layer. rate: ρ(s) + s μ, the contraction with the smallest admissible θ.\n"
    "largest s: of rate < 1. Source: Chen, Liu, Wang, Yin 2018, Theorem 2; d, ρ: see analysis/convergence.py."
)


def _layer_cells(certificate: Certificate, layer: int) -> list[str]:
    constants, condition = certificate.constants, certificate.condition[layer]
    worst = (constants.diagonal, constants.coherence, constants.noise_gain)
    index = torch.tensor(certificate.sparsity)[:, None]
    return [
        str(layer + 1),
        f"{certificate.thresholds[layer]:.4g}",
        f"{int(condition.sum())}/{len(condition)}",
        *(f"{values[layer].max():.4g}" for values in worst),
        f"{constants.factors[layer].gather(-1, index).max():.4g}",
        f"{certificate.rates[layer].max():.4g}",
        str(int(constants.largest_sparsity[layer].min())),
        f"{certificate.errors[layer + 1].sum():.4g}",
    ]


def certify(
    unrolled: Unrolled,
    sparsity: int | Sequence[int],
    amplitude: float,
    noise: float = 0.0,
    constants: LayerConstants | None = None,
) -> Certificate:
    """Apply the theorem of this module (its statement and proof: the module's docstring) to each block.

    Args:
        unrolled: one-bit, float or plain ISTA. Without thresholds, each layer gets the smallest admissible one.
        sparsity: s, the most nonzeros of x* in a block: one number, or one for each block.
        amplitude: B, with ‖x*‖_∞ ≤ B.
        noise: σ, with ‖ε‖_∞ ≤ σ.
        constants: those of ``unrolled`` where they are known already.

    Raises:
        ValueError: a sparsity below 0 or above n, not one a block; an amplitude or noise below 0 or not finite.

    Example:
        >>> operator = 0.1 * torch.ones(1, 4, 4) + 0.9 * torch.eye(4)
        >>> certificate = certify(Unrolled(operator, torch.eye(4)[None], torch.ones(20)), sparsity=2, amplitude=1.0)
        >>> certificate.holds, certificate.largest_sparsity, round(certificate.rates.max().item(), 3)
        (True, 4, 0.3)
    """
    constants, thresholds = constants or layer_constants(unrolled), unrolled.thresholds
    layers, blocks, n = constants.factors.shape[0], constants.factors.shape[1], constants.factors.shape[2] - 1
    s = (sparsity,) * blocks if isinstance(sparsity, int) else tuple(sparsity)
    if len(s) != blocks or min(s) < 0 or max(s) > n:
        raise ValueError(f"expected a sparsity of 0 to {n}, or one for each of {blocks} blocks; got {sparsity}")
    if not (0 <= amplitude < float("inf") and 0 <= noise < float("inf")):
        raise ValueError(f"expected a finite amplitude and noise of at least 0; got {amplitude} and {noise}")
    counts = torch.tensor(s)
    error = counts * torch.tensor(amplitude, dtype=torch.float64)
    errors, conditions, used = [error], [], []
    certified = torch.ones(blocks, dtype=torch.bool)
    for k in range(layers):
        noise_term = constants.noise_gain[k] * noise
        needed = constants.coherence[k] * error + noise_term
        threshold = needed.max() if thresholds is None else thresholds[k]
        certified = certified & (threshold >= needed)
        factor = constants.factors[k].gather(-1, counts[:, None]).squeeze(-1)
        following = factor * error + counts * (threshold + noise_term)
        error = torch.where(certified, following, torch.inf)
        used.append(threshold)
        conditions.append(certified)
        errors.append(error)
    return Certificate(constants, s, amplitude, noise, torch.stack(used), torch.stack(conditions), torch.stack(errors))
