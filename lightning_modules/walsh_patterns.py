"""Walsh patterns of a single-pixel camera: ±1 by a rule, of which nothing is stored, in several orders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.block_patterns import Correlation, PatternOperator
from lightning_modules.operators.subsampled import hadamard_transform
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["WALSH_ORDERS", "WalshPatterns", "sign_changes", "walsh_order"]


def sign_changes(rows: Tensor) -> Tensor:
    """The sequency of each row: how often the sign changes along it.

    Args:
        rows: shape ``(rows, n)``, entries ±1.

    Returns:
        Shape ``(rows,)``.

    Example:
        >>> sign_changes(hadamard_transform(torch.eye(4)))
        tensor([0, 3, 1, 2])
    """
    return (rows[:, 1:] != rows[:, :-1]).sum(1)


def _natural(vertical: Tensor, horizontal: Tensor, along_pixels: Tensor) -> Tensor:
    return torch.arange(len(along_pixels))


def _sequency(vertical: Tensor, horizontal: Tensor, along_pixels: Tensor) -> Tensor:
    return along_pixels


def _total_sequency(vertical: Tensor, horizontal: Tensor, along_pixels: Tensor) -> Tensor:
    return vertical + horizontal


def _largest_sequency(vertical: Tensor, horizontal: Tensor, along_pixels: Tensor) -> Tensor:
    return torch.maximum(vertical, horizontal)


def _cake_cutting(vertical: Tensor, horizontal: Tensor, along_pixels: Tensor) -> Tensor:
    return (vertical + 1) * (horizontal + 1)


# What an order sorts by, of the sign changes down a column, along a row, and along all pixels row by row.
WALSH_ORDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "natural": _natural,
    "sequency": _sequency,
    "total_sequency": _total_sequency,
    "largest_sequency": _largest_sequency,
    "cake_cutting": _cake_cutting,
}


def walsh_order(block_size: int, order: str) -> Tensor:
    """The rows of Sylvester's Hadamard matrix of block² columns in an order of `WalshPatterns`, a permutation.

    What an order does not decide is decided by total sequency, then by the row number.

    Raises:
        ValueError: a block size that is no power of two, or an unknown order.

    Example:
        >>> walsh_order(2, "natural").tolist(), walsh_order(2, "sequency").tolist()
        ([0, 1, 2, 3], [0, 2, 3, 1])
    """
    if block_size < 1 or block_size.bit_count() != 1:
        raise ValueError(f"block_size={block_size}: Walsh patterns have a power of two pixels in a row")
    if order not in WALSH_ORDERS:
        raise ValueError(f"order={order!r}: expected one of {', '.join(WALSH_ORDERS)}")
    of_line = sign_changes(hadamard_transform(torch.eye(block_size)))
    # Row i · block + j is the outer product of rows i (down) and j (along) of the small matrix.
    vertical, horizontal = of_line.repeat_interleave(block_size), of_line.repeat(block_size)
    along_pixels = sign_changes(hadamard_transform(torch.eye(block_size**2)))
    by_total = torch.argsort(vertical + horizontal, stable=True)
    keys = WALSH_ORDERS[order](vertical, horizontal, along_pixels)
    return by_total[torch.argsort(keys[by_total], stable=True)]


@records_arguments
class WalshPatterns(PatternOperator):
    """The first patterns of the Walsh basis of a block in some order: ±1/block, orthonormal, known by a rule.

    A Walsh pattern is the outer product of a Walsh function down the block and one along it. The orders:

    - ``natural``: as Sylvester's construction gives them;
    - ``sequency``: by sign changes along the pixels of the block, row by row;
    - ``total_sequency``: by the sum of the sign changes down and along, the low frequencies in all directions first;
    - ``largest_sequency``: by the larger of the two: a square of low frequencies;
    - ``cake_cutting``: by the number of connected pieces of one sign (Yu, "Super Sub-Nyquist Single-Pixel Imaging by
      Means of Cake-Cutting Hadamard Basis Sort", Sensors 19, 2019), which is the product of both sequencies plus one.

    Args:
        block_size: pixels of a block's side, a power of two.
        measurements: patterns.
        order: a key of `WALSH_ORDERS`.
        correlation: of the pixels, for the linear estimate: ``separable`` or ``isotropic``.

    Raises:
        ValueError: a block size that is no power of two, an unknown order or correlation, no measurements, or more than
            pixels.

    Example:
        >>> 2 * WalshPatterns(block_size=2, measurements=3).matrix()
        tensor([[ 1.,  1.,  1.,  1.],
                [ 1., -1.,  1., -1.],
                [ 1.,  1., -1., -1.]])
    """

    patterns: Tensor

    def __init__(
        self,
        block_size: int = 16,
        measurements: int = 64,
        order: str = "total_sequency",
        correlation: Correlation = "separable",
    ) -> None:
        super().__init__(block_size, measurements, correlation)
        rows = walsh_order(block_size, order)[:measurements]
        basis = hadamard_transform(torch.eye(block_size**2))
        self.register_buffer("patterns", basis[rows] / block_size, persistent=False)

    @override
    def matrix(self) -> Tensor:
        return self.patterns
