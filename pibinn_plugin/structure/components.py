"""The connected components of a sparse matrix, seen as a graph that links the rows and columns of its nonzeros."""

import torch
from torch import Tensor


def components(rows: int, columns: int, row_index: Tensor, column_index: Tensor) -> tuple[Tensor, Tensor]:
    """The component of each row and of each column: the number of its first row.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        row_index: int64, of each nonzero.
        column_index: int64, of each nonzero.

    Returns:
        int64, shapes ``(rows,)`` and ``(columns,)``; rows and columns of zeros have numbers of their own.

    Example:
        >>> components(3, 3, torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2]))
        (tensor([0, 1, 2]), tensor([1, 0, 1]))
    """
    label = torch.arange(rows + columns, device="cpu")
    column_node = column_index + rows
    while True:
        least = torch.minimum(label[row_index], label[column_node])
        new = label.clone()
        # The label of a node's label takes part too, which halves the distance to the root in each round.
        for node in (row_index, column_node, label[row_index], label[column_node]):
            new = new.scatter_reduce(0, node, least, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label[:rows], label[rows:]
        label = new
