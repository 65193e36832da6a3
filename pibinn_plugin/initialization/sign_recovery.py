r"""How many pairs (x, y = w · x) determine the n signs of a row w = λ s.

Without noise, a sign vector s is the only point of the box |v| ≤ 1 with X v = X s if and only if the null space of
X, of N pairs as rows, holds no v ≠ 0 with s_j v_j ≤ 0 for all j. For inputs in general position whose distribution
does not change when the sign of any unknown does, the null space is one of dimension n - N, and meets an orthant as
n random points in n - N dimensions lie in one half-space (Wendel, "A problem in geometric probability", 1962; in
this form Donoho and Tanner, "Counting the faces of randomly-projected hypercubes and orthants", 2010):

.. math:: P(\text{all signs determined}) = 2^{1 - n} \sum_{k=0}^{N-1} \binom{n - 1}{k}.

It passes from 0 to 1 around N = n / 2, within a few √n / 2. Inputs that are often zero determine less: they are not in
general position.
"""

from __future__ import annotations

import math

__all__ = ["pairs_for_signs", "signs_determined"]


def signs_determined(pairs: int, unknowns: int) -> float:
    """The probability that noiseless pairs determine all signs of a row within the box: the formula above.

    Args:
        pairs: N.
        unknowns: n, the structural nonzeros of the row, at least 1.

    Example:
        >>> signs_determined(2, 3), signs_determined(32, 64)
        (0.75, 0.5)
    """
    if pairs >= unknowns:
        return 1.0
    return sum(math.comb(unknowns - 1, k) for k in range(pairs)) / 2 ** (unknowns - 1)


def pairs_for_signs(unknowns: int, probability: float = 0.99) -> int:
    """The fewest pairs that determine all signs of a row with this probability at least.

    Args:
        unknowns: n, at least 1.
        probability: in (0, 1].

    Example:
        >>> pairs_for_signs(64), pairs_for_signs(64, 0.5)
        (42, 32)
    """
    wanted, sum_of_counts = math.ceil(probability * 2 ** (unknowns - 1)), 0
    for pairs in range(unknowns):
        if sum_of_counts >= wanted:
            return pairs
        sum_of_counts += math.comb(unknowns - 1, pairs)
    return unknowns
