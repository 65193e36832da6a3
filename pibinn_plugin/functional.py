"""`packed_linear`: multiply by a one-bit weight without leaving its packed form in memory longer than one call.

The reference in plain torch operations: it traces, compiles, exports and differentiates (input and λ).
"""

from torch import Tensor

from pibinn_plugin.packing import unpack_signs
from pibinn_plugin.structure import Shape, Structure


def packed_linear(
    input: Tensor, bits: Tensor, scale: Tensor, structure: Structure, shape: Shape, bias: Tensor | None = None
) -> Tensor:
    """``y = λ (S ⊙ M) x + b``.

    Args:
        input: x, shape ``(..., columns)``, floating point.
        bits: uint8, shape ``(ceil(nnz / 8),)``, the packed signs.
        scale: λ, shape ``(1,)``.
        structure: M.
        shape: the dense shape ``(rows, columns)`` of the weight.
        bias: b, shape ``(rows,)``.

    Returns:
        shape ``(..., rows)``, in the dtype of ``input``.

    Example:
        >>> import torch
        >>> from pibinn_plugin import Dense
        >>> bits = torch.tensor([0b0110], dtype=torch.uint8)  # [[-1, +1], [+1, -1]]
        >>> packed_linear(torch.tensor([1.0, 3.0]), bits, torch.tensor([0.5]), Dense(), (2, 2))
        tensor([ 1., -1.])
    """
    signs = unpack_signs(bits, structure.compact_shape(shape), input.dtype)
    output = structure.linear(input, signs, shape) * scale.to(input.dtype)
    return output if bias is None else output + bias
