r"""In how many bits a network can be told from all others that training could have given, in five schemes of weights.

The code is fixed before training: the physics and the structure of the weights are known and cost nothing; every number
that training changes does. A float costs 32 bits, whatever its value. Of a weight with n structural nonzeros

- ``one-bit`` tells n signs, and λ with the other floats of the network;
- ``one-bit, flips`` tells which k of the n signs differ from a prior that is known before training, such as sign(Aᵀ):
  log₂(n + 1) bits for k and log₂ C(n, k) for the positions. Σ_k C(n, k) · 2^-(log₂ C(n, k) + log₂(n + 1)) = 1;
- ``ternary`` tells n of three values, log₂ 3 bits each, and λ;
- ``channel-wise`` tells n signs and a float for each row;
- ``float`` tells n floats.

A weight of several layers is told once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.analysis.network import CompactWeight

__all__ = ["FLOAT_BITS", "CodeLengths", "code_lengths", "flip_bits"]

FLOAT_BITS = 32


@dataclass(frozen=True, eq=False)
class CodeLengths:
    """What `code_lengths` counts, for one of the equal blocks of a network.

    Args:
        nonzeros: structural nonzeros of the one-bit weights in the block.
        rows: their rows in the block.
        floats: numbers of the network that training changes beside them, λ among them.
        flipped: in each block, the signs that differ from the prior, shape ``(blocks,)``; None without a prior.
    """

    nonzeros: int
    rows: int
    floats: int
    flipped: Tensor | None = None

    @property
    def blocks(self) -> int:
        """1 unless signs were counted block by block."""
        return 1 if self.flipped is None else len(self.flipped)

    def bits(self) -> dict[str, Tensor]:
        """By scheme, the bits of each block; one number where all blocks have the same."""
        floats, others = self.floats * FLOAT_BITS, (self.floats - 1) * FLOAT_BITS  # with λ, and without
        lengths: dict[str, float | Tensor] = {"one-bit": self.nonzeros + floats}
        if self.flipped is not None:
            lengths["one-bit, flips"] = flip_bits(self.nonzeros, self.flipped) + floats
        lengths |= {
            "ternary": self.nonzeros * math.log2(3) + floats,
            "channel-wise": self.nonzeros + self.rows * FLOAT_BITS + others,
            "float": self.nonzeros * FLOAT_BITS + others,
        }
        return {scheme: torch.as_tensor(length, dtype=torch.float64) for scheme, length in lengths.items()}


def flip_bits(nonzeros: int, flipped: Tensor) -> Tensor:
    """log₂ C(n, k) + log₂(n + 1): the bits that tell which k of n signs differ from a prior.

    Example:
        >>> flip_bits(10, torch.tensor([0, 5])).round(decimals=2)
        tensor([ 3.4600, 11.4400], dtype=torch.float64)
    """
    n, k = torch.tensor(nonzeros, dtype=torch.float64), flipped.double()
    log_count = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return log_count / math.log(2) + torch.log2(n + 1)


def code_lengths(
    weights: Sequence[CompactWeight], floats: int, prior: Sequence[CompactWeight] | None = None, blocks: int = 1
) -> CodeLengths:
    """Count the bits of a network, block by block where it is so many equal networks side by side.

    Args:
        weights: the one-bit weights of the network.
        floats: numbers that training changes beside them, λ among them: each block needs them all.
        prior: the weights of the same names with signs that were known before training.
        blocks: a number of equal diagonal blocks that all weights have.

    Raises:
        ValueError: a weight that has not so many blocks, or a prior of other weights.

    Example:
        >>> from lightning_modules.analysis.network import one_bit_weights
        >>> from pibinn_plugin import BlockDiagonal, prepare
        >>> weights = one_bit_weights(prepare(torch.nn.Linear(8, 4), {"weight": BlockDiagonal(2)}))
        >>> {scheme: float(bits[0]) for scheme, bits in code_lengths(weights, 2, weights, 2).bits().items()
        ...  if scheme.startswith("one-bit, ")}
        {'one-bit, flips': 67.16992500144231}
    """
    unfit = [weight.name for weight in weights if blocks > 1 and weight.equal_blocks != blocks]
    if unfit or (prior is not None and [each.name for each in prior] != [each.name for each in weights]):
        raise ValueError(f"{', '.join(unfit) or 'the prior'}: expected weights of {blocks} blocks, and the same names")
    flipped = None
    if prior is not None:
        pairs = zip(weights, prior, strict=True)
        flipped = torch.stack([(a.signs != b.signs).reshape(blocks, -1).sum(-1) for a, b in pairs]).sum(0)
    rows = sum(int((weight.row_nonzeros > 0).sum()) for weight in weights)
    return CodeLengths(sum(weight.signs.numel() for weight in weights) // blocks, rows // blocks, floats, flipped)
