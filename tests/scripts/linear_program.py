"""The smallest ρ(s) + s μ of any real weight, as a linear program: what bounds of s must not exclude."""

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix


def smallest_rate(a, sparsity):
    """min over W of max_j (|1 - G_jj| + the s - 1 largest |G_ij| of column j) + s max_{i ≠ j} |G_ij|, G = W A.

    The sum of the k largest of nonnegative numbers v is min over t of k t + Σ (v - t)_+, so that it is linear.
    """
    m, n = a.shape
    k = sparsity - 1
    # Variables: W (n m), μ, ρ, then for each column j: |1 - G_jj|, t_j ≥ 0, and |G_ij|, (|G_ij| - t_j)_+.
    weight = lambda i, r: i * m + r  # noqa: E731
    coherence, factor, first = n * m, n * m + 1, n * m + 2
    diagonal, cut = (lambda j: first + j), (lambda j: first + n + j)
    size, excess = (lambda i, j: first + 2 * n + i * n + j), (lambda i, j: first + 2 * n + n * n + i * n + j)
    rows, columns, values, right = [], [], [], []

    def at_most(terms, bound):
        row = len(right)
        for column, value in terms:
            rows.append(row)
            columns.append(column)
            values.append(value)
        right.append(bound)

    for j in range(n):
        gain = [(weight(j, r), a[r, j]) for r in range(m)]
        at_most([*gain, (diagonal(j), -1)], 1)  # G_jj - 1 ≤ |1 - G_jj|
        at_most([*((c, -v) for c, v in gain), (diagonal(j), -1)], -1)
        largest = [(cut(j), k)]
        for i in range(n):
            if i == j:
                continue
            gain = [(weight(i, r), a[r, j]) for r in range(m)]
            for sign in (1, -1):
                at_most([*((c, sign * v) for c, v in gain), (size(i, j), -1)], 0)
            at_most([(size(i, j), 1), (coherence, -1)], 0)
            at_most([(size(i, j), 1), (cut(j), -1), (excess(i, j), -1)], 0)
            largest.append((excess(i, j), 1))
        at_most([*largest, (diagonal(j), 1), (factor, -1)], 0)
    count = first + 2 * n + 2 * n * n
    cost = np.zeros(count)
    cost[factor], cost[coherence] = 1, sparsity
    bounds = [(None, None)] * (n * m) + [(0, None)] * (count - n * m)
    matrix = coo_matrix((values, (rows, columns)), shape=(len(right), count)).tocsr()
    found = linprog(cost, matrix, right, bounds=bounds, method="highs")
    assert found.success, found.message
    return found.fun
