"""Rows drawn from a fast orthogonal transform: no matrix is stored, and a product costs n log n."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_modules.operators.base import check_size
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["SubsampledDCT", "SubsampledHadamard", "dct", "hadamard_transform", "inverse_dct"]


def hadamard_transform(x: Tensor) -> Tensor:
    r"""The Walsh-Hadamard transform of the last axis in Sylvester's order, not normalised.

    .. math:: H_1 = 1, \quad H_{2n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}

    Args:
        x: shape ``(..., n)``, n a power of two.

    Returns:
        ``H x``, the same shape.

    Example:
        >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([10., -2., -4.,  0.])
    """
    size = x.shape[-1]
    for level in range(size.bit_length() - 1):
        first, second = x.unflatten(-1, (-1, 2, 2**level)).unbind(-2)
        x = torch.stack([first + second, first - second], -2).flatten(-3)
    return x


def dct(x: Tensor) -> Tensor:
    r"""The orthonormal discrete cosine transform (type II) of the last axis, by one FFT.

    .. math:: X_k = c_k \sum_j x_j \cos\frac{\pi k (2j + 1)}{2n}, \quad c_0 = \sqrt{1/n}, \quad c_k = \sqrt{2/n}

    After Makhoul, "A Fast Cosine Transform in One and Two Dimensions", IEEE Transactions on Acoustics, Speech, and
    Signal Processing 28, 1980.

    Args:
        x: shape ``(..., n)``, real.

    Returns:
        X, the same shape.

    Example:
        >>> dct(torch.ones(4))
        tensor([2., 0., 0., 0.])
    """
    size = x.shape[-1]
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    cosine, sine, weight = _dct_factors(size, x)
    return weight * (spectrum.real * cosine + spectrum.imag * sine)


def inverse_dct(coefficients: Tensor) -> Tensor:
    """The inverse of `dct`, which is its adjoint.

    Args:
        coefficients: X, shape ``(..., n)``, real.

    Returns:
        x, the same shape.

    Example:
        >>> inverse_dct(torch.tensor([2.0, 0.0, 0.0, 0.0]))
        tensor([1., 1., 1., 1.])
    """
    size = coefficients.shape[-1]
    cosine, sine, weight = _dct_factors(size, coefficients)
    scaled = coefficients / weight
    mirrored = torch.cat([torch.zeros_like(scaled[..., :1]), scaled[..., 1:].flip(-1)], -1)
    spectrum = torch.complex(scaled * cosine + mirrored * sine, scaled * sine - mirrored * cosine)
    reordered = torch.fft.ifft(spectrum).real
    half = (size + 1) // 2
    even, odd = reordered[..., :half], reordered[..., half:].flip(-1)
    if size % 2:
        odd = torch.cat([odd, torch.zeros_like(even[..., :1])], -1)
    return torch.stack([even, odd], -1).flatten(-2)[..., :size]


def _dct_factors(size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    angle = torch.arange(size, dtype=like.dtype, device=like.device) * (math.pi / (2 * size))
    weight = torch.cat([like.new_full((1,), math.sqrt(1 / size)), like.new_full((size - 1,), math.sqrt(2 / size))])
    return angle.cos(), angle.sin(), weight


class _SubsampledTransform(nn.Module):
    """Rows of an orthogonal transform of all unknowns, drawn without replacement from a seed."""

    row_index: Tensor

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        if not 1 <= rows <= columns:
            raise ValueError(f"rows={rows}, columns={columns}: expected from 1 to {columns} rows of the transform")
        chosen = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
        self.register_buffer("row_index", chosen, persistent=False)
        self.shape = (rows, columns)

    def _selected(self, transformed: Tensor) -> Tensor:
        return transformed.index_select(-1, self.row_index)

    def _spread(self, y: Tensor) -> Tensor:
        """The adjoint of the selection: zero where nothing was measured."""
        y = check_size(y, self.shape[0], "y")
        return y.new_zeros((*y.shape[:-1], self.shape[1])).index_copy(-1, self.row_index, y)


@records_arguments
class SubsampledHadamard(_SubsampledTransform):
    """Rows of the Walsh-Hadamard matrix, entries ±1/√rows: the patterns of a single-pixel camera (DMD), from a seed.

    Args:
        rows: measurements.
        columns: unknowns, a power of two.
        seed: of the choice of rows.

    Raises:
        ValueError: columns that are no power of two, or more rows than columns; by ``A`` and ``A_adjoint``, a wrong
            size.

    Example:
        >>> operator = SubsampledHadamard(rows=4, columns=16)
        >>> operator.A(torch.eye(16)).abs().unique()
        tensor([0.5000])
    """

    def __init__(self, rows: int = 256, columns: int = 512, seed: int = 0) -> None:
        super().__init__(rows, columns, seed)
        if columns.bit_count() != 1:
            raise ValueError(f"columns={columns}: a Hadamard transform has a power of two")

    def A(self, x: Tensor) -> Tensor:
        """``A x``: ``(..., unknowns)`` to ``(..., measurements)``."""
        return self._selected(hadamard_transform(check_size(x, self.shape[1], "x"))) / self.shape[0] ** 0.5

    def A_adjoint(self, y: Tensor) -> Tensor:
        """``Aᵀ y``: ``(..., measurements)`` to ``(..., unknowns)``; H is symmetric."""
        return hadamard_transform(self._spread(y)) / self.shape[0] ** 0.5


@records_arguments
class SubsampledDCT(_SubsampledTransform):
    """Rows of the orthonormal discrete cosine transform, from a seed: ``A Aᵀ`` is the identity.

    Args:
        rows: measurements.
        columns: unknowns.
        seed: of the choice of rows.

    Raises:
        ValueError: more rows than columns, or none; by ``A`` and ``A_adjoint``, a wrong size.

    Example:
        >>> operator = SubsampledDCT(rows=2, columns=5)
        >>> (operator.A(operator.A_adjoint(torch.eye(2))) - torch.eye(2)).abs().max() < 1e-6
        tensor(True)
    """

    def __init__(self, rows: int = 256, columns: int = 512, seed: int = 0) -> None:
        super().__init__(rows, columns, seed)

    def A(self, x: Tensor) -> Tensor:
        """``A x``: ``(..., unknowns)`` to ``(..., measurements)``."""
        return self._selected(dct(check_size(x, self.shape[1], "x")))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """``Aᵀ y``: ``(..., measurements)`` to ``(..., unknowns)``."""
        return inverse_dct(self._spread(y))
