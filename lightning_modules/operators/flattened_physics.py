"""FlattenedPhysics: physics on images, such as deepinv's, as an operator on rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.operators.base import check_size
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["FlattenedPhysics"]


@records_arguments
class FlattenedPhysics(nn.Module):
    """Linear physics with ``A`` and ``A_adjoint`` on tensors of any shape, and perhaps no ``shape`` of its own.

    deepinv's linear physics maps a batch of images ``(batch, channels, height, width)`` to measurements of a shape that
    depends on the physics. Here both are flattened to rows, and the ``shape`` is read off one product with zeros.

    Args:
        physics: an object with methods ``A`` and ``A_adjoint``; a module moves and is saved with this one.
        unknown_shape: of one unknown without the batch, such as ``(channels, height, width)``.

    Raises:
        ValueError: no such methods, measurements that are no real tensor of one batch, or that are not
            zero for an unknown that is (an offset, or noise), or an adjoint that gives another shape than that of the
            unknown; by ``A`` and ``A_adjoint``, a wrong size.

    Example:
        >>> class Rows:
        ...     def A(self, image):
        ...         return image.sum(-1)
        ...     def A_adjoint(self, sums):
        ...         return sums[..., None].expand(*sums.shape, 3)
        >>> operator = FlattenedPhysics(Rows(), (1, 2, 3))
        >>> operator.shape, operator.A(torch.arange(6.0)), operator.A_adjoint(torch.tensor([1.0, 2.0]))
        ((2, 6), tensor([ 3., 12.]), tensor([1., 1., 1., 2., 2., 2.]))
    """

    def __init__(self, physics: Any, unknown_shape: Sequence[int]) -> None:
        super().__init__()
        if not callable(getattr(physics, "A", None)) or not callable(getattr(physics, "A_adjoint", None)):
            raise ValueError(f"expected physics with methods A and A_adjoint; got {type(physics).__name__}")
        self.physics, self.unknown_shape = physics, tuple(unknown_shape)
        with torch.no_grad():
            unknown = torch.zeros(1, *self.unknown_shape)
            measured = physics.A(unknown)
            if not isinstance(measured, Tensor) or measured.is_complex() or measured.shape[:1] != (1,):
                found = tuple(measured.shape) if isinstance(measured, Tensor) else type(measured).__name__
                raise ValueError(f"A of one unknown gave {found}; expected a real tensor (1, ...)")
            if measured.count_nonzero():
                raise ValueError(f"{type(physics).__name__} is not linear: A of zero is not zero")
            back = physics.A_adjoint(measured)
        if back.shape != unknown.shape:
            raise ValueError(
                f"A_adjoint gave shape {tuple(back.shape)}; expected {tuple(unknown.shape)}, that of the unknown"
            )
        self.measurement_shape = tuple(measured.shape[1:])
        self.shape = (math.prod(self.measurement_shape), math.prod(self.unknown_shape))

    def A(self, x: Tensor) -> Tensor:
        """``A x``: ``(..., unknowns)`` to ``(..., measurements)``."""
        images = check_size(x, self.shape[1], "x").reshape(-1, *self.unknown_shape)
        return self.physics.A(images).reshape(*x.shape[:-1], self.shape[0])

    def A_adjoint(self, y: Tensor) -> Tensor:
        """``Aᵀ y``: ``(..., measurements)`` to ``(..., unknowns)``."""
        measurements = check_size(y, self.shape[0], "y").reshape(-1, *self.measurement_shape)
        return self.physics.A_adjoint(measurements).reshape(*y.shape[:-1], self.shape[1])
