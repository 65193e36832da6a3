"""A weight that was unpacked for inference, kept while its bits and λ stay as they are.

Unpacking takes longer than a small product. So what reads a packed weight as a tensor reads one that was unpacked
before, if nothing can have changed since: the same tensors, which nobody has written to. Whatever is traced, compiled,
transformed or differentiated unpacks in its own graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad
from torch import Tensor, nn

_PLAIN = frozenset({Tensor, nn.Parameter})


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """A weight, and all that it was unpacked from.

    Args:
        weight: ``λ · S ⊙ M``, a float tensor.
        bits: the packed signs, uint8.
        scale: the tensor that holds λ, shape ``(1,)``.
        state: of the three, as `_state` gives it.
    """

    weight: Tensor
    bits: Tensor
    scale: Tensor
    state: tuple[object, ...]

    def is_of(self, bits: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
        """Whether unpacking anew would give the same."""
        return bits is self.bits and scale is self.scale and self.state == _state(self.weight, bits, scale, dtype)


def unpacked(
    kept: KeptWeight | None, bits: Tensor, scale: Tensor, dtype: torch.dtype, unpack: Callable[[], Tensor]
) -> KeptWeight:
    """The weight that is kept, if it is still what ``unpack`` would give; else what that gives now.

    Args:
        kept: what an earlier call returned.
        bits: the packed signs; of what `can_keep` is true.
        scale: the tensor that holds λ.
        dtype: of the weight.
        unpack: makes the weight.
    """
    if kept is not None and kept.is_of(bits, scale, dtype):
        return kept
    # No tensor of inference mode, which later could not take part where a gradient of the input is computed.
    with torch.inference_mode(False), torch.no_grad():
        before = _state(bits, bits, scale, dtype)
        weight = unpack()
        # Read before: whoever writes meanwhile, from another thread, makes it stale.
        return KeptWeight(weight, bits, scale, (weight._version, *before[1:]))


def can_keep(bits: Tensor, scale: Tensor) -> bool:
    """Whether a weight that is read here and now may be one that was unpacked before.

    Not where λ is to have a gradient, nor under a transform, a trace or a capture, which unpack in their own graph; and
    not for tensors that count no writes, those made in inference mode.
    """
    return (
        type(bits) in _PLAIN
        and type(scale) in _PLAIN
        and not (scale.requires_grad and torch.is_grad_enabled())
        and not bits.is_inference()
        and not scale.is_inference()
        and not bits.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not (bits.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _state(weight: Tensor, bits: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    """What changes when one of them is written to, moved or converted.

    λ by its number too, where reading it waits for no device: averages write to parameters through ``.data``, which
    counts as no write.
    """
    number = scale.item() if scale.is_cpu else scale.data_ptr()
    return weight._version, bits._version, scale._version, number, scale.dtype, scale.device, dtype
