"""Booleans to bytes and back, in plain torch operations that trace, compile and export.

Little-endian inside a byte: element ``8 * i + j`` is bit ``j`` of byte ``i``. Unpacking uses AND and a comparison,
because shifts have no ONNX mapping; in int32, which torch's compiler has vector instructions for: a hundred times as
fast as in uint8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack a flat boolean tensor into bytes.

    Args:
        flags: boolean, shape ``(count,)``.

    Returns:
        uint8, shape ``(ceil(count / 8),)``; the bits past ``count`` are zero.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    groups = F.pad(flags.to(torch.uint8), (0, -flags.numel() % 8)).unflatten(0, (-1, 8))
    return (groups * _bit_values(flags.device, torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Invert `pack_bits`.

    Args:
        packed: uint8, shape ``(ceil(count / 8),)``.
        count: the number of booleans that were packed.

    Returns:
        boolean, shape ``(count,)``.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3)
        tensor([ True, False,  True])
    """
    return bits_of_bytes(packed).flatten()[:count]


def bits_of_bytes(packed: Tensor) -> Tensor:
    """The bits of each byte, the lowest first.

    Args:
        packed: uint8, shape ``(bytes,)``.

    Returns:
        boolean, shape ``(bytes, 8)``.

    Example:
        >>> bits_of_bytes(torch.tensor([5], dtype=torch.uint8)).int()
        tensor([[1, 0, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    return (packed.to(torch.int32).unsqueeze(-1) & _bit_values(packed.device, torch.int32)) != 0


def _bit_values(device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "cpu":
        return torch.tensor(_BIT_VALUES, dtype=dtype, device=device)
    # Made there: a copy from the CPU can be no part of a graph that is captured for replay.
    return (1 << torch.arange(8, device=device)).to(dtype)
