"""Whether two networks give the same outputs, up to the order of summation."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from pibinn_plugin.errors import PIBiNNError

TOLERANCE = 1e-4  # of the largest output magnitude: what differs is the order of summation in float32


def check_same_outputs(
    actual: Any, expected: Any, name: str, reference: str, error_type: type[PIBiNNError] = PIBiNNError
) -> None:
    """Raise unless two results hold tensors of the same shapes that differ by rounding only.

    Args:
        actual: what a network returned: tensors, in any nesting.
        expected: what the other one returned.
        name: of the network, for the message.
        reference: of the other.
        error_type: what is raised.
    """
    ours, theirs = outputs_of(actual), outputs_of(expected)
    shapes = [[tuple(y.shape) for y in outputs] for outputs in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise error_type(f"{name} returns shapes {shapes[0]}, {reference} {shapes[1]}")
    for number, (y, other) in enumerate(zip(ours, theirs, strict=True)):
        wide = torch.complex128 if other.is_complex() else torch.float64
        actual_values, expected_values = y.detach().cpu().to(wide), other.detach().cpu().to(wide)
        same = (actual_values == expected_values) | (actual_values.isnan() & expected_values.isnan())
        if same.all():
            continue
        difference = (actual_values - expected_values)[~same].abs().max().item()
        largest = (
            expected_values[expected_values.isfinite()].abs().max().item() if expected_values.isfinite().any() else 0.0
        )
        # Half precision rounds every layer's output to its own few bits.
        allowed = max(TOLERANCE, 8 * torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0)
        if not difference <= allowed * largest:  # also where one of them is NaN
            raise error_type(
                f"output {number} of {name} differs from {reference} by {difference:.2g}, where the largest magnitude "
                f"is {largest:.2g}; expected at most {allowed:.0e} of it"
            )


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors that a network returned, a Brevitas ``QuantTensor`` by its value."""
    leaves = pytree.tree_leaves(result, is_leaf=lambda x: hasattr(x, "zero_point"))
    values = (getattr(leaf, "value", leaf) for leaf in leaves)
    return [value for value in values if isinstance(value, Tensor)]
