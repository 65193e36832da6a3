"""The reference semantics, a page of torch: ``W = λ · sign(V) ⊙ M`` with one λ for the whole network.

Every scheme calls `SignQuantizer`, which is why their forward values are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from typing_extensions import override

from pibinn_plugin.errors import ScaleError
from pibinn_plugin.structure import Shape, Structure
from pibinn_plugin.structure.checkpoint import StructureInStateDict, is_placeholder


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
        ScaleError: ``initial`` is not positive and finite.

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
        self.is_registered = False  # set by the first module that takes it as a child: it must be the only one
        self.set(initial)

    def set(self, value: float) -> None:
        """Overwrite λ in place. Raises `ScaleError` for a value that is not positive and finite."""
        if not 0.0 < value < float("inf"):
            raise ScaleError(f"the global scale must be positive and finite; got {value}")
        with torch.no_grad():
            self.value.fill_(value)

    def forward(self) -> Tensor:
        """λ, shape ``(1,)``: positive whatever an optimizer did to the parameter, and exactly it where it is."""
        return self.value.abs().clamp_min(torch.finfo(self.value.dtype).tiny)

    @override
    def extra_repr(self) -> str:
        if hasattr(self.value, "full_tensor"):
            return "sharded"  # its value is on another rank, or asking for it would need all ranks
        if type(self.value) not in (nn.Parameter, Tensor):
            return "traced"  # torch.export prints modules, and a fake tensor has no value
        return f"{self.value.item():.4g}" if self.value.device.type != "meta" else "meta"


class SignQuantizer(StructureInStateDict, nn.Module):
    """Maps the latents of one weight to ``λ · sign(V) ⊙ M``; while not ``enabled``, to ``V ⊙ M``.

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
        >>> quantizer(torch.tensor([[0.1, -7.0], [3.0, -0.2]])).tolist()
        [[0.5, 0.0], [0.0, -0.5]]
    """

    mask: Tensor | None

    def __init__(
        self,
        scale: GlobalScale,
        structure: Structure,
        shape: Shape,
        compact: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        structure.check(shape)
        self.structure, self.shape, self.compact, self.enabled = structure, tuple(shape), compact, True
        # In a tuple, so that nn.Module does not register it here: λ is registered once, at the root.
        self._scale = (scale,)
        masked = not compact and structure.nnz(shape) < torch.Size(shape).numel()
        self.register_buffer("mask", structure.mask(shape, device) if masked else None, persistent=False)

    @property
    def scale(self) -> GlobalScale:
        """The network's λ."""
        return self._scale[0]

    def forward(self, latent: Tensor) -> Tensor:
        """Args: latent: V, dense or compact. Returns: W, in the same shape and dtype."""
        if self.mask is not None and self.mask.device != latent.device:
            # load_state_dict(assign=True) on the meta device: the mask is in no state dict, so it is made here.
            self.mask = self.structure.mask(self.shape, latent.device)
        if self.enabled:
            return quantize_sign(latent, self.scale(), self.mask)
        # λ takes part with a zero gradient: distributed training expects one from every parameter.
        latent = latent + 0.0 * self.scale().to(latent.dtype)
        return latent if self.mask is None else torch.where(self.mask, latent, torch.zeros_like(latent))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning a weight to a parametrized parameter sets its latents."""
        return weight

    def structural(self, latent: Tensor) -> Tensor:
        """The structural nonzeros of the latent, in compact form."""
        return latent.detach() if self.compact else self.structure.to_compact(latent.detach())

    @override
    def get_extra_state(self) -> Tensor:
        return torch.cat([torch.tensor([self.enabled], dtype=torch.uint8), super().get_extra_state()])

    @override
    def set_extra_state(self, state: Tensor) -> None:
        if not is_placeholder(state):
            super().set_extra_state(state[1:])
            self.enabled = bool(state[0])  # weights of the float warm-up are float weights, wherever they are loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SignQuantizer:
        was_meta = self.mask is not None and self.mask.device.type == "meta"
        super()._apply(fn, recurse)
        if was_meta and self.mask is not None and self.mask.device.type != "meta":
            # to_empty leaves garbage in every buffer, and the mask is in no state dict: rebuild it from the rule.
            self.mask = self.structure.mask(self.shape, self.mask.device)
        return self

    @override
    def extra_repr(self) -> str:
        return f"{self.structure}, shape={self.shape}, compact={self.compact}, enabled={self.enabled}"
