"""Signs to bits and back: `PackedSigns`, the one stored layout of a one-bit weight.

One bit for each structural nonzero, in the structure's compact order, set where the sign is +1; whole bytes per weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pibinn_plugin.bits import pack_bits, unpack_bits
from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure import Shape, Structure


def unpack_signs(bits: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The signs ±1 in the given (compact) shape and dtype, in plain torch operations.

    Example:
        >>> unpack_signs(torch.tensor([5], dtype=torch.uint8), (3,), torch.float32)
        tensor([ 1., -1.,  1.])
    """
    flags = unpack_bits(bits, torch.Size(shape).numel()).reshape(tuple(shape))
    return flags.to(dtype) * 2 - 1


@dataclass(frozen=True, eq=False)
class PackedSigns:
    """The signs of one weight, packed.

    Args:
        bits: uint8, shape ``(ceil(nnz / 8),)``.
        structure: where the structural nonzeros are.
        shape: the dense shape of the weight.

    Raises:
        StructureError: the structure does not fit the shape, or the bits do not fit both.

    Example:
        >>> from pibinn_plugin.structure import Banded
        >>> PackedSigns.pack(torch.tensor([[1.0, 0.0], [-2.0, 3.0]]), Banded(1, 0), (2, 2)).bits
        tensor([6], dtype=torch.uint8)
    """

    bits: Tensor
    structure: Structure
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.structure.check(self.shape)
        expected = (-(-self.structure.nnz(self.shape) // 8),)
        if tuple(self.bits.shape) != expected or self.bits.dtype != torch.uint8:
            raise StructureError(
                f"the signs of a weight of shape {self.shape} with {self.structure} are uint8 of shape {expected}; "
                f"got {self.bits.dtype} of shape {tuple(self.bits.shape)}"
            )

    @classmethod
    def pack(cls, latent: Tensor, structure: Structure, shape: Shape, compact: bool = False) -> PackedSigns:
        """Pack ``sign(latent)``, with ``sign(0) = +1``; the latent is dense, or ``compact``.

        Raises:
            StructureError: a structural latent is NaN or infinite, and has no sign (in training it gives NaN).
        """
        values = latent.detach() if compact else structure.to_compact(latent.detach())
        if not values.isfinite().all():
            raise StructureError(f"a latent of a weight of shape {tuple(shape)} is not finite and has no sign")
        return cls(pack_bits((values >= 0).flatten()), structure, tuple(shape))

    def to(self, device: torch.device) -> PackedSigns:
        """The same weight on a device."""
        return PackedSigns(self.bits.to(device), self.structure, self.shape)

    @property
    def nnz(self) -> int:
        """The number of structural nonzeros, each one bit."""
        return self.structure.nnz(self.shape)

    def signs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """±1 in compact form."""
        return unpack_signs(self.bits, self.structure.compact_shape(self.shape), dtype)

    def weight(self, scale: Tensor, compact: bool, dtype: torch.dtype) -> Tensor:
        """``λ · S ⊙ M``, dense or compact, differentiable in λ; bit for bit what the latents gave."""
        values = scale.to(dtype) * self.signs(dtype)
        return values if compact else self.structure.to_dense(values, self.shape)
