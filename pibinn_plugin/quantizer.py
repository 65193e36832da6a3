"""The reference semantics, a page of torch: ``W = λ · sign(V) ⊙ M`` with one λ for the whole network.

Every scheme calls `SignQuantizer`, which is why their forward values are bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.errors import PIBiNNError, ScaleError, StructureError
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.structure import Shape, Structure
from pibinn_plugin.structure.checkpoint import StructureInStateDict, checked_state, is_placeholder

# What a state dict says of a quantizer; 0 and 1 are those of files without signs.
_DISABLED, _ENABLED, _FROZEN = 2, 3, 4

READ_ONLY = (
    "this weight is one-bit, λ · sign(V) ⊙ M, and cannot be assigned, deleted or parametrized (BatchNorm and norms "
    "cannot be fused into it): write to its latent, quantized_weights(model)[i].latent, or change the weight before "
    "prepare"
)


def sign_ste(latent: Tensor) -> Tensor:
    """The sign with ``sign(0) = +1``; the gradient passes straight through (identity).

    Exactly ±1 in every dtype. No ``autograd.Function``, so that compile, jvp, vmap and hessian work.

    Example:
        >>> sign_ste(torch.tensor([-0.3, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])
    """
    value = latent.detach()
    # The half makes +1 of sign(0). Eight times faster on a CPU than torch.where, and NaN stays NaN.
    sign = torch.sign(value).add_(0.5).sign_()
    return (latent - value).add_(sign)


def quantize_sign(latent: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """``λ · sign(V) ⊙ M``, the mask applied after the sign (arXiv 2502.01908).

    Args:
        latent: V, any shape.
        scale: λ, shape ``(1,)``, positive.
        mask: boolean M in the shape of ``latent``; None where V holds structural nonzeros only.

    Returns:
        W in the shape and dtype of ``latent``.

    Example:
        >>> quantize_sign(torch.tensor([-0.3, 0.1]), torch.tensor([0.5]), torch.tensor([True, False]))
        tensor([-0.5000,  0.0000])
    """
    weight = scale.to(latent.dtype) * sign_ste(latent)
    # Selecting, not multiplying: 0 * -λ would be -0.0, and packed weights are compared bit for bit.
    return weight if mask is None else torch.where(mask, weight, torch.zeros_like(weight))


def initial_scale(latents: Iterable[Tensor]) -> float:
    """The least-squares λ of all latents together: the mean of ``|V|`` over the structural nonzeros of the network.

    ``min_λ Σ (V - λ sign V)²`` has the solution ``mean|V|`` (Rastegari et al., 2016, for one tensor).

    Args:
        latents: the structural nonzeros of each target, in any shape.

    Raises:
        ScaleError: the mean is zero or not finite.

    Example:
        >>> initial_scale([torch.tensor([-1.0, 3.0]), torch.tensor([2.0])])
        2.0
    """
    total, count = 0.0, 0
    for latent in latents:
        total += latent.detach().abs().sum(dtype=torch.float64).item()
        count += latent.numel()
    value = total / count
    if not 0.0 < value < float("inf"):
        raise ScaleError(f"the mean of |V| over {count} latents is {value}; expected a positive finite number")
    return value


class GlobalScale(nn.Module):
    """λ, the one positive scale of a network.

    It is registered once, at the root of the model; layers hold an unregistered reference to this *module*. A shared
    parameter would come apart under ``load_state_dict(assign=True)`` and ``to_empty``.

    Args:
        initial: the value to start from, positive and finite.

    Raises:
        ScaleError: ``initial`` is not positive and finite, or rounds to zero or to infinity in this dtype; or, when a
            state dict is loaded, it holds a λ that is not finite.

    Example:
        >>> GlobalScale(0.5)()
        tensor([0.5000], grad_fn=<ClampMinBackward0>)
    """

    def __init__(
        self, initial: float = 1.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        # Shape (1,): FSDP2 refuses parameters without a dimension.
        self.value = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self._has_owner = False
        self.set(initial)

    def set(self, value: float) -> None:
        """Overwrite λ in place. Raises `ScaleError` for a value that this dtype has no positive finite number for."""
        check_scale(value, self.value.dtype)
        with torch.no_grad():
            self.value.fill_(value)

    def register_in(self, module: nn.Module, name: str = "pibinn_scale") -> None:
        """Become a child of the one module that owns λ; a λ that has an owner stays with it."""
        if not self._has_owner:
            module.add_module(name, self.train(module.training))
            self._has_owner = True

    def forward(self) -> Tensor:
        """λ, shape ``(1,)``: positive whatever an optimizer did to the parameter, and exactly it where it is."""
        return positive(self.value)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        value: Any = state_dict.get(f"{prefix}value")
        is_one_number = isinstance(value, Tensor) and value.numel() == 1 and not hasattr(value, "full_tensor")
        if is_one_number and value.device.type != "meta" and not math.isfinite(number := float(value)):
            raise ScaleError(f"the global scale in the state dict is {number}; expected a finite number")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalScale:
        if self.value.device.type != "meta" and not hasattr(self.value, "full_tensor"):
            dtype = fn(self.value.detach().new_zeros(1)).dtype
            if dtype != self.value.dtype:
                check_scale(abs(self.value.item()), dtype)
        return super()._apply(fn, recurse)

    @override
    def extra_repr(self) -> str:
        if hasattr(self.value, "full_tensor"):
            return "sharded"  # its value is on another rank, or asking for it would need all ranks
        if type(self.value) not in (nn.Parameter, Tensor):
            return "traced"  # torch.export prints modules, and a fake tensor has no value
        return f"{self.value.item():.4g}" if self.value.device.type != "meta" else "meta"


def positive(value: Tensor) -> Tensor:
    """λ of its parameter: its magnitude, and no zero."""
    return value.abs().clamp_min(smallest_scale(value.dtype))


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest positive number of a dtype, subnormal ones included: below it λ would be 0."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def check_scale(value: float, dtype: torch.dtype) -> None:
    """Raise `ScaleError` unless the value is a positive finite number, in this dtype too."""
    rounded = torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).item()
    if not 0.0 < value < float("inf") or not 0.0 < rounded < float("inf"):
        raise ScaleError(
            f"the global scale must be positive and finite in {dtype}; got {value}"
            + (f", which rounds to {rounded}" if 0.0 < value < float("inf") else "")
        )


class OneBitRule(StructureInStateDict, nn.Module):
    """What a latent and packed bits are read through: λ, the structure, and the shape of the weight.

    Args:
        scale: the network's λ.
        structure: M.
        shape: the dense shape of the weight.
        compact: True where the weight is stored compactly and holds structural nonzeros only.

    Raises:
        StructureError: the structure does not fit the shape; or, when a state dict is loaded, it holds another
            structure than this one.
    """

    def __init__(self, scale: GlobalScale, structure: Structure, shape: Shape, compact: bool) -> None:
        super().__init__()
        structure.check(shape)
        self.structure, self.shape, self.compact = structure, tuple(shape), compact
        # In a tuple, so that nn.Module does not register it here: λ is registered once, at the root.
        self._scale = (scale,)

    is_attached = False  # as a parametrization: from then on the weight is read only

    @property
    def scale(self) -> GlobalScale:
        """The network's λ."""
        return self._scale[0]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The tensor itself while torch registers this as a parametrization; torch also calls it for an assignment.

        Raises:
            PIBiNNError: the weight is assigned. It would not be read back.
        """
        if self.is_attached:
            raise PIBiNNError(READ_ONLY)
        return weight

    @override
    def extra_repr(self) -> str:
        return f"{self.structure}, shape={self.shape}, compact={self.compact}"


def real_device(device: torch.device | str | None) -> torch.device:
    """Where constants beside a latent are made: never on the meta device, as no state dict would bring their values."""
    return torch.device("cpu" if device is None or torch.device(device).type == "meta" else device)


class SignQuantizer(OneBitRule):
    """Maps the latents of one weight to ``λ · sign(V) ⊙ M``; while not ``enabled``, to ``V ⊙ M``.

    Frozen, it reads the signs that it keeps, and no longer those of the latent: whatever an optimizer, an average or
    somebody's hand writes to the latent, the weight stays. A state dict holds the frozen signs as bits.

    Args:
        scale: the network's λ.
        structure: M.
        shape: the dense shape of the weight.
        compact: True where the latent is stored compactly and holds structural nonzeros only.
        device: where the latent lives.

    Raises:
        StructureError: the structure does not fit the shape; or, when a state dict is loaded, it holds another
            structure than this one.

    Example:
        >>> from pibinn_plugin.structure import BlockDiagonal
        >>> quantizer = SignQuantizer(GlobalScale(0.5), BlockDiagonal(2), (2, 2))
        >>> latent = torch.tensor([[0.1, -7.0], [3.0, -0.2]])
        >>> quantizer(latent).tolist()
        [[0.5, 0.0], [0.0, -0.5]]
        >>> quantizer.freeze(PackedSigns.pack(latent, BlockDiagonal(2), (2, 2)))
        >>> quantizer(-latent).tolist()
        [[0.5, 0.0], [0.0, -0.5]]
    """

    def __init__(
        self,
        scale: GlobalScale,
        structure: Structure,
        shape: Shape,
        compact: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(scale, structure, shape, compact)
        self.enabled = True
        masked = not compact and structure.nnz(shape) < torch.Size(shape).numel()
        # Mask and signs are no buffers: averages, swaps and broadcasts of a model's buffers must not reach them.
        self.mask: Tensor | None = structure.mask(shape, real_device(device)) if masked else None
        self.signs: Tensor | None = None  # frozen: S ⊙ M as int8, in the shape of the latent

    def forward(self, latent: Tensor) -> Tensor:
        """Args: latent: V, dense or compact. Returns: W, in the same shape and dtype."""
        if not self.enabled:
            # λ takes part with a zero gradient: distributed training expects one from every parameter.
            return self.masked(latent + 0.0 * self.scale().to(latent.dtype))
        if self.signs is not None:
            return self.scale().to(latent.dtype) * self._signs_on(latent.device)
        return quantize_sign(latent, self.scale(), self._mask_on(latent.device))

    def masked(self, latent: Tensor) -> Tensor:
        """``V ⊙ M``: the latent as a float weight."""
        mask = self._mask_on(latent.device)
        return latent if mask is None else torch.where(mask, latent, torch.zeros_like(latent))

    def structural(self, latent: Tensor) -> Tensor:
        """The structural nonzeros of the latent, in compact form."""
        return latent.detach() if self.compact else self.structure.to_compact(latent.detach())

    def freeze(self, packed: PackedSigns) -> None:
        """Read these signs from now on, whatever the latent is."""
        self.signs = packed.weight(packed.bits.new_ones(1), self.compact, torch.int8)

    def thaw(self) -> None:
        """Read the signs of the latent again."""
        self.signs = None

    def packed(self, latent: Tensor) -> PackedSigns:
        """The signs that the weight has: the frozen ones, or those of a latent.

        Raises:
            StructureError: the latent decides, and is not finite.
        """
        return PackedSigns.pack(latent if self.signs is None else self.signs, self.structure, self.shape, self.compact)

    def _signs_on(self, device: torch.device) -> Tensor:
        assert self.signs is not None
        if self.signs.device != device:
            if device.type == "meta":
                return self.signs.to(device)
            self.signs = self.signs.to(device)
        return self.signs

    def _mask_on(self, device: torch.device) -> Tensor | None:
        if self.mask is not None and self.mask.device != device:
            # After load_state_dict(assign=True) of a model on the meta device, say: from the rule, not by copying.
            mask = self.structure.mask(self.shape, device)
            if device.type == "meta":
                return mask
            self.mask = mask
        return self.mask

    @override
    def get_extra_state(self) -> Tensor:
        """Which signs are read, the length of the structure in 4 bytes, the structure, and the bits of frozen signs.

        Of one length in every stage, as distributed checkpoints need it.
        """
        structure = super().get_extra_state()
        if self.signs is None:
            state = _ENABLED if self.enabled else _DISABLED
            bits = structure.new_zeros(-(-self.structure.nnz(self.shape) // 8))
        else:
            state, bits = _FROZEN, self.packed(self.signs).bits.cpu()
        head = structure.new_tensor([state, *len(structure).to_bytes(4, "little")])
        return torch.cat([head, structure, bits])

    @override
    def set_extra_state(self, state: Tensor) -> None:
        if is_placeholder(state):
            return
        state = checked_state(state)
        if state[0] in (0, 1):  # as it was before signs could be frozen: whether it is enabled, and the structure
            kind, start, end = _ENABLED if state[0] else _DISABLED, 1, len(state)
        else:
            kind, start = int(state[0]), 5
            end = start + int.from_bytes(bytes(state[1:5].tolist()), "little")
        if kind not in (_DISABLED, _ENABLED, _FROZEN) or not start < end <= len(state):
            raise StructureError(f"the state dict holds no state of a sign quantizer, but {state.tolist()[:8]} ...")
        super().set_extra_state(state[start:end])
        signs = PackedSigns(state[end:], self.structure, self.shape) if start > 1 else None  # zeros, if not frozen
        self.thaw()
        self.enabled = kind != _DISABLED  # weights of the float warm-up are float weights, wherever they are loaded
        if kind == _FROZEN and signs is not None:
            self.freeze(signs)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SignQuantizer:
        super()._apply(fn, recurse)
        for name in ("mask", "signs"):
            tensor = getattr(self, name)
            if tensor is not None and (device := fn(tensor.new_empty(0)).device).type != "meta":
                setattr(self, name, tensor.to(device))  # the device only: to_empty would leave garbage in it
        return self

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enabled={self.enabled}, frozen={self.signs is not None}"
