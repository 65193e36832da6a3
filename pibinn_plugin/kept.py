"""What was made of packed bits for inference, kept while they stay as they are.

Unpacking takes longer than a small product. So what reads a packed weight as a tensor reads one that was unpacked
before, if nothing can have changed since: the same tensors, which nobody has written to. Whatever is traced, compiled,
transformed or differentiated unpacks in its own graph. What multiplies bits reads them in the order of their use,
likewise: putting them into that order takes up to half of the time of a product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = frozenset({Tensor, nn.Parameter})

# Looked up once: a read of a kept weight is to take no longer than that of a parameter.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_gradients_are_enabled = torch.is_grad_enabled


class KeptWeight:
    """A weight unpacked now, and all that it was unpacked from.

    Args:
        bits: the packed signs, of which `can_be_kept` is true.
        scale: the tensor that holds λ, shape ``(1,)``, likewise.
        unpack: gives the weight.
    """

    def __init__(self, bits: Tensor, scale: Tensor, unpack: Callable[[], Tensor]) -> None:
        self.bits, self.scale = bits, scale
        # Read before: what another thread writes meanwhile makes this stale.
        self._bits_version, self._scale_version = bits._version, scale._version
        self._bits_place = _Place(bits)
        # By their bytes too, where reading them waits for no device. Writes through ``.data`` count as none: those of
        # averages to λ, and those of networks that clamp or normalize the weights that they read.
        is_on_cpu = bits.is_cpu and scale.is_cpu
        self._scale_bytes = _Bytes(scale) if is_on_cpu else None
        # No tensor of inference mode, which could not take part later where a gradient of the input is computed.
        with torch.inference_mode(False), torch.no_grad():
            self.weight = unpack()
            # For compiled code, in which `refresh` looks at the bits themselves: of no bits that there are.
            self.seen = torch.zeros(bits.numel() + 4, dtype=torch.uint8, device=bits.device)
            self._least_bytes = _Bytes(self.weight.view(-1)[self.weight.argmin()]) if is_on_cpu else None
        self._weight_version, self._weight_address = self.weight._version, self.weight.data_ptr()

    def is_of(self, bits: Tensor, scale: Tensor | None) -> bool:
        """Whether unpacking these anew, here and now, would give nothing else; written out, since it is often asked."""
        weight, scale_bytes, least_bytes = self.weight, self._scale_bytes, self._least_bytes
        return (
            bits is self.bits
            and scale is self.scale
            and bits.data_ptr() == self._bits_place.address  # first: a tensor of inference mode has no version
            and bits._version == self._bits_version
            and weight._version == self._weight_version
            and not (_gradients_are_enabled() and scale.requires_grad)
            and _dispatch_modes() == 0
            and _tracing_state() is None
            and (
                (scale._version == self._scale_version and not torch.cuda.is_current_stream_capturing())
                if scale_bytes is None or least_bytes is None
                else (
                    scale.data_ptr() == scale_bytes.address  # first: memory that was given back is not read
                    and weight.data_ptr() == self._weight_address
                    and scale_bytes.now.raw == scale_bytes.then
                    and least_bytes.now.raw == least_bytes.then
                )
            )
        )


class KeptWords:
    """Bits that are laid out for products now, and what they were laid out from.

    Args:
        bits: the packed signs, of which `can_be_laid_out` is true.
        lay_out: gives what products take in the place of the bits; None where they are to take the bits.
    """

    def __init__(self, bits: Tensor, lay_out: Callable[[], Tensor | None]) -> None:
        self.bits, self._version = bits, bits._version  # before: what another thread writes meanwhile makes this stale
        self._place = _Place(bits)
        self.words = lay_out()

    def is_of(self, bits: Tensor) -> bool:
        """Whether laying these out anew, here and now, would give nothing else."""
        return (
            bits is self.bits
            and bits.data_ptr() == self._place.address  # first: a tensor of inference mode has no version
            and bits._version == self._version
            and _dispatch_modes() == 0
        )


class _Place:
    """Where a tensor had its values: one that is given those of another (``.data = ``, a swap) may count no write."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = tensor.untyped_storage()  # alive, so that nothing else comes to lie there
        self.address = tensor.data_ptr()


class _Bytes(_Place):
    """The bytes of a small tensor on the CPU, then and now: read in a quarter of the time of ``tensor.item()``."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.now = (ctypes.c_char * tensor.nbytes).from_address(self.address)
        self.then = self.now.raw


def can_be_laid_out(bits: Tensor) -> bool:
    """Whether what is laid out from these, here and now, may be used again later: by the kernel for processors."""
    return bits.is_cpu and type(bits) in _PLAIN and not bits.is_inference() and _dispatch_modes() == 0


def can_be_kept(bits: Tensor, scale: Tensor) -> bool:
    """Whether a weight that is unpacked from these, here and now, may be read again later.

    Not where λ is to have a gradient, nor where a trace, a transform or a capture is to hold the unpacking itself; and
    not for tensors made in inference mode, which count no writes.
    """
    return (
        type(bits) in _PLAIN
        and type(scale) in _PLAIN
        and not bits.is_meta
        and not bits.is_inference()
        and not scale.is_inference()
        and not (_gradients_are_enabled() and scale.requires_grad)
        and _dispatch_modes() == 0
        and _tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not (bits.is_cuda and torch.cuda.is_current_stream_capturing())
    )
