"""Random structures, each with the shape of a weight that it fits."""

import numpy as np
import torch
from hypothesis import strategies as st

from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask

sizes = st.integers(1, 7)


@st.composite
def dense(draw):
    return Dense(), tuple(draw(st.lists(sizes, min_size=2, max_size=4)))


@st.composite
def banded(draw):
    rows, columns = draw(st.tuples(sizes, sizes))
    return Banded(draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))), (rows, columns)


@st.composite
def block_diagonal(draw):
    blocks = draw(st.integers(1, 4))
    orders = {}
    if draw(st.booleans()):
        block = st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any)  # one without both is refused
        heights, widths = map(list, zip(*draw(st.lists(block, min_size=blocks, max_size=blocks)), strict=True))
        heights[0], widths[0] = max(1, heights[0]), max(1, widths[0])
        shape, fields = (sum(heights), sum(widths)), {"rows": heights, "columns": widths}
    else:
        kernel = draw(st.sampled_from([(), (3,), (2, 2)]))
        shape = (blocks * draw(st.integers(1, 3)), blocks * draw(st.integers(1, 3)), *kernel)
        fields = {"blocks": blocks}
    if draw(st.booleans()):
        orders["row_order"] = draw(st.permutations(range(shape[0])))
        orders["column_order"] = draw(st.permutations(range(int(np.prod(shape[1:])))))
    return BlockDiagonal(**fields, **orders), shape


@st.composite
def patterns(draw):
    shape = draw(st.one_of(st.tuples(sizes, sizes), st.tuples(sizes, sizes, sizes)))
    count = int(np.prod(shape))
    flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    flags[draw(st.integers(0, count - 1))] = True
    pattern = torch.tensor(flags).reshape(shape)
    height, width = draw(st.sampled_from([(1, 1), (1, 1), (2, 3), (4, 1)]))  # tiles too
    return pattern.repeat_interleave(height, 0).repeat_interleave(width, 1)


def ruled_structures():
    return st.one_of(dense(), banded(), block_diagonal())


def structures():
    return st.one_of(ruled_structures(), patterns().map(lambda pattern: (Mask(pattern), tuple(pattern.shape))))
