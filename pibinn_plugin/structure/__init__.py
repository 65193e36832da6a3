"""Where a weight may be nonzero: `Dense`, `BlockDiagonal`, `Banded`, `Mask`, and `structure_from_operator`.

A structure is a rule that physics gives and training never touches: a frozen, hashable value that knows its mask, how
its nonzeros are laid out in memory ("compact"), how to multiply by them, and how many bytes its own description takes.

Weights of more than two dimensions (convolutions) are seen as the matrix ``(shape[0], prod(shape[1:]))``.
"""

from pibinn_plugin.structure.banded import Banded
from pibinn_plugin.structure.base import Shape, Structure, matrix_shape
from pibinn_plugin.structure.block_diagonal import BlockDiagonal
from pibinn_plugin.structure.dense import Dense
from pibinn_plugin.structure.from_operator import structure_from_operator
from pibinn_plugin.structure.mask import Mask
from pibinn_plugin.structure.operator_support import SmallEntriesWarning

__all__ = [
    "Banded",
    "BlockDiagonal",
    "Dense",
    "Mask",
    "Shape",
    "SmallEntriesWarning",
    "Structure",
    "matrix_shape",
    "structure_from_operator",
]
