"""Where multiplying bits breaks even: for how many samples it takes less time than a product of floats.

Both give the same values, so this is about time alone. Measured for float32 on Zen 3 with AVX2 and one thread
(``benchmarks/break_even.py``), module against module, and cut so that no layer is slower than its float layer there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Shape, Structure, matrix_shape

# Of products with a whole matrix, those where (rows · columns)² · samples is smaller: 2^15 weights for one sample, 2^12
# for 64. The call of the kernel takes longer than torch's, and torch becomes faster with more samples.
_SMALL = 2**30
# Rows or columns of a dense matrix: the kernel works on 32 columns at a time, whose tables pay for many rows.
_NARROW = 24
# Weights of a block of a whole matrix, and for each 32 columns of a block that stands by itself, as these cost the
# kernel the same however few they are.
_TINY, _TINY_COMPACT = 32, 400
# Blocks times samples from which tiny blocks take longer than the call of the kernel saves.
_MANY = 512
# Structural weights from which compiled code multiplies bits, where torch multiplies by nothing else: it unpacks fewer
# in the graph, and fuses their product with what is around it, in less time than the call of the kernel takes.
_LARGE_IN_GRAPHS = {Dense: 2**12, Banded: 2**13, BlockDiagonal: 2**15}
# Of a weight with zeros, which are not placed in a graph in less time, those up to which it multiplies bits even where
# that never pays.
_SMALL_WITH_ZEROS = 2**13
# Weights of a layer, and of one of its equal blocks, up to which compiled solvers read them, once for many products.
_SMALL_IN_SOLVERS, _SMALL_BLOCK_IN_SOLVERS = 2**14, 2**11


class BreakEven(NamedTuple):
    """For how many samples a linear layer takes less time on its bits.

    Args:
        least: samples from which it does.
        most: samples up to which it does; less than `least` where it never does.
        in_graphs: whether compiled code, which may take any number of samples, is to multiply bits.
        in_solvers: whether it is to do so where it multiplies by one weight many times.
    """

    least: float
    most: float
    in_graphs: bool
    in_solvers: bool


def break_even(structure: Structure, shape: Shape, compact: bool) -> BreakEven:
    """When a linear layer takes less time on its bits.

    Args:
        structure: of the weight.
        shape: of the weight, dense.
        compact: whether the float layer multiplies by structural weights alone, as `CompactLinear`.

    Example:
        >>> break_even(Dense(), (1024, 1024), compact=False)
        BreakEven(least=1, most=inf, in_graphs=True, in_solvers=True)
        >>> break_even(Dense(), (64, 64), compact=False).least
        64
    """
    is_whole = not compact or isinstance(structure, Dense)  # torch multiplies by all of the matrix
    least = _least_samples(structure, shape) if is_whole else 1
    most = math.inf if is_whole else _most_samples(structure, shape)
    pays = least < math.inf and most == math.inf
    return BreakEven(least, most, _in_graphs(structure, shape, compact, pays), _in_solvers(structure, shape))


def _in_graphs(structure: Structure, shape: Shape, compact: bool, pays: bool) -> bool:
    nonzeros = structure.nnz(shape)
    if compact or isinstance(structure, Dense):
        return pays and nonzeros >= _LARGE_IN_GRAPHS.get(type(structure), 0)
    return pays or nonzeros <= _SMALL_WITH_ZEROS


def _in_solvers(structure: Structure, shape: Shape) -> bool:
    if structure.nnz(shape) <= _SMALL_IN_SOLVERS:
        return False
    if not isinstance(structure, BlockDiagonal) or structure.rows is not None:
        return True
    _, rows, columns = structure.compact_shape(shape)
    return rows * columns > _SMALL_BLOCK_IN_SOLVERS


def _least_samples(structure: Structure, shape: Shape) -> float:
    rows, columns = matrix_shape(shape)
    weights, nonzeros = rows * columns, structure.nnz(shape)
    least = math.ceil(_SMALL / weights**2)
    if isinstance(structure, Dense):
        return math.inf if min(rows, columns) < _NARROW else least
    if isinstance(structure, BlockDiagonal):
        return math.inf if nonzeros < _TINY * len(structure.sizes(shape)[0]) else least
    # Torch multiplies by the zeros too, at up to seven times the rate. A band is put into the order of rows first.
    if 4 * nonzeros > weights:
        return math.inf
    is_dense = (16 if isinstance(structure, Banded) else 8) * nonzeros > weights
    return max(least, 4) if is_dense else least


def _most_samples(structure: Structure, shape: Shape) -> float:
    if not isinstance(structure, BlockDiagonal) or structure.rows is not None:
        return math.inf
    blocks, rows, columns = structure.compact_shape(shape)
    is_tiny = rows * columns <= _TINY_COMPACT * math.ceil(columns / 32)
    return _MANY // blocks if is_tiny else math.inf
