r"""How far the true mean of a loss can be above its measured mean: the Chernoff bound, with one code for all networks.

Let ℓ be the loss in [0, 1] of a network on an example, p its mean over the distribution of the examples, p̂ its
mean over N independent ones, and kl(p̂ ‖ p) = p̂ ln(p̂ / p) + (1 - p̂) ln((1 - p̂) / (1 - p)).

**One network, fixed before the examples were seen.** For p̂ ≤ p, P(kl(p̂ ‖ p) ≥ ε, p̂ < p) ≤ exp(-N ε) (Chernoff; for a
loss in [0, 1] by Hoeffding, "Probability inequalities for sums of bounded random variables", 1963: convexity gives
E exp(s ℓ) ≤ 1 - p + p exp(s), that of a coin). So with probability 1 - δ at least, kl(p̂ ‖ p) ≤ ln(1/δ) / N where p̂ < p.

**A network that was chosen on these examples.** Let every network that could have been chosen have a code of L
bits, with Σ 2^-L ≤ 1 over all networks (Kraft), the code fixed before the examples were seen. Spend δ 2^-L on each
network: with probability 1 - δ at least, for *all* networks at once,

.. math:: \mathrm{kl}(\hat p \,\|\, p) \le \frac{L \ln 2 + \ln(1/\delta)}{N} \quad \text{where } \hat p < p

(Occam's razor bound: Blumer, Ehrenfeucht, Haussler and Warmuth, 1987; in this form Langford, "Tutorial on practical
prediction theory for classification", JMLR 6, 2005, Theorem 4.6). kl grows with p for p ≥ p̂, and its inverse is the
bound of p. Lengths need not be whole numbers.

**Separate blocks.** Where a network is B networks side by side, the loss is a mean over them and δ / B is spent on
each, every one pays only for the bits of its own block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["binary_kl", "code_bound", "confidence_interval", "examples_for_gap", "largest_mean"]

_BISECTIONS = 100


def binary_kl(measured: Tensor, true: Tensor) -> Tensor:
    """kl(p̂ ‖ p) of two coins, element by element; infinite where p is 0 or 1 and p̂ is not.

    Example:
        >>> binary_kl(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.5]))
        tensor([0.6931, 0.0000])
    """
    difference = torch.special.xlogy(measured, measured) - torch.special.xlogy(measured, true)
    rest = torch.special.xlogy(1 - measured, 1 - measured) - torch.special.xlog1py(1 - measured, -true)
    return (difference + rest).clamp_min(0)


def largest_mean(measured: Tensor, budget: Tensor | float) -> Tensor:
    """The largest p ≥ p̂ with kl(p̂ ‖ p) ≤ budget, in float64 and rounded up; by bisection.

    Example:
        >>> largest_mean(torch.tensor(0.0), math.log(20) / 100)  # the "rule of three": 3 / N
        tensor(0.0295, dtype=torch.float64)
    """
    measured = measured.double()
    low, high = measured, torch.ones_like(measured)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = binary_kl(measured, middle) <= budget
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return high


def code_bound(measured: Tensor, bits: Tensor | float, examples: int, failure_probability: float) -> float:
    """The bound of the mean over blocks of the true loss, for a network of so many bits chosen on the examples.

    Args:
        measured: the mean loss of each block, shape ``(blocks,)``.
        bits: L, of each block or of all.
        examples: N.
        failure_probability: δ, of the whole.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> round(code_bound(torch.tensor([0.1]), bits=100, examples=1000, failure_probability=0.05), 2)
        0.25
        >>> round(code_bound(torch.tensor([0.1]), bits=3200, examples=1000, failure_probability=0.05), 3)
        0.941
    """
    in_range = bool(((measured >= 0) & (measured <= 1)).all()) and bool((torch.as_tensor(bits) >= 0).all())
    if not in_range or examples < 1 or not 0 < failure_probability < 1:
        raise ValueError(
            f"measured={measured.tolist()}, bits={bits}, examples={examples}, failure_probability="
            f"{failure_probability}: expected losses in [0, 1], bits of at least 0, an example, a probability in (0, 1)"
        )
    bits = torch.as_tensor(bits, dtype=torch.float64)
    budget = (bits * math.log(2) + math.log(len(measured) / failure_probability)) / examples
    return float(largest_mean(measured, budget).mean())


def confidence_interval(measured: float, independent: int, failure_probability: float) -> tuple[float, float]:
    """Where the true mean is, for a network that was not chosen on the examples; δ/2 on each side.

    Args:
        measured: the mean over independent examples, or of the means of independent groups of examples.
        independent: their number.
        failure_probability: δ.

    Example:
        >>> low, high = confidence_interval(0.5, 1000, 0.05)
        >>> round(low, 3), round(high, 3)
        (0.457, 0.543)
    """
    budget = math.log(2 / failure_probability) / independent
    value = torch.tensor(measured, dtype=torch.float64)
    return float(1 - largest_mean(1 - value, budget)), float(largest_mean(value, budget))


def examples_for_gap(
    measured: float, gap: float, bits: float, failure_probability: float, blocks: int = 1
) -> int | None:
    """The smallest N for which `code_bound` is at most the measured loss and a gap; None where that is above 1.

    Example:
        >>> examples_for_gap(0.1, gap=0.15, bits=100, failure_probability=0.05)
        998
    """
    if measured + gap >= 1:
        return None
    rate = binary_kl(*torch.tensor([measured, measured + gap], dtype=torch.float64))
    return math.ceil((bits * math.log(2) + math.log(blocks / failure_probability)) / float(rate))
