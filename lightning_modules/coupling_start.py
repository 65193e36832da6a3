"""Where the couplings of `LocalFields` start: at solutions of pseudo-likelihood problems from training samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.inverse_ising import box_couplings, one_bit_couplings, ridge_couplings, ternary_couplings
from pibinn_plugin.errors import PIBiNNError, TargetError
from pibinn_plugin.sharding import assign
from pibinn_plugin.structure import Structure
from pibinn_plugin.targets import resolve_targets
from pibinn_plugin.weights import global_scale, quantized_weights

__all__ = ["COUPLINGS", "CouplingsFromSamples"]

# What float weights may start at: λ S is the network that one-bit weights start at.
COUPLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "ridge": ridge_couplings,
    "box": box_couplings,
    "signs": lambda spins: one_bit_couplings(spins).weight,
    "ternary": ternary_couplings,
}


class CouplingsFromSamples:
    """Start the one-bit couplings of `LocalFields` at those that the training samples make likely.

    See `one_bit_couplings`. A batch is (spins, spins), and all batches are one pass through the samples: a sample that
    comes twice counts twice. The weights of a comparison's baselines start at one of ``solutions``.

    Args:
        solutions: of `COUPLINGS`, that `lightning_modules.compare` may start float and other weights from.
        weights: pattern of the name of the couplings' weight.

    Raises:
        PIBiNNError: an unknown solution, or none; by the call, several processes, or samples of another lattice.

    Example:
        >>> import pibinn_plugin as pb
        >>> from lightning_modules.data.spin_samples import SpinSamples
        >>> from lightning_modules.solvers.local_fields import LocalFields
        >>> data = SpinSamples(size=4, coupling=0.5, training_samples=200)
        >>> data.setup()
        >>> solver = pb.prepare(LocalFields(size=4), {"weight": None})
        >>> CouplingsFromSamples()(solver, data.train_dataloader())
        >>> torch.equal(solver.weight.sign(), data.couplings.sign())
        True
    """

    def __init__(self, solutions: Sequence[str] = tuple(COUPLINGS), weights: str = "*") -> None:
        if not solutions or not set(solutions) <= COUPLINGS.keys():
            raise PIBiNNError(f"solutions={list(solutions)}: expected some of {', '.join(COUPLINGS)}")
        self.solutions, self.weights = tuple(solutions), weights

    def __call__(
        self, model: nn.Module, batches: Iterable[Any], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Set latents and λ from the samples in the batches.

        Raises:
            TargetError: not one weight of that name.
            PIBiNNError: several processes, each with samples of its own, or samples of another lattice.
            ScaleError: samples that say nothing of the couplings.
        """
        named = [weight for weight in quantized_weights(model) if fnmatchcase(weight.name, self.weights)]
        if len(named) != 1:
            raise TargetError(
                f"{self.weights!r} names {len(named)} weights of the prepared model; expected the one of LocalFields"
            )
        if sum_over_ranks is not None and (processes := int(sum_over_ranks(torch.ones(1)))) > 1:
            raise PIBiNNError(f"the samples lie on {processes} processes: train couplings on one (trainer.devices: 1)")
        latent = named[0].latent
        start = one_bit_couplings(_samples(batches, latent))
        assign(latent, start.latent)
        global_scale(model).set(start.scale)

    def start_float_weights(
        self, model: nn.Module, targets: Mapping[str, Structure | None], batches: Iterable[Any], solution: str
    ) -> None:
        """Set the float weight of a model that is not prepared to a solution from the samples in the batches.

        Raises:
            TargetError: not one weight of that name.
            PIBiNNError: samples of another lattice.
            ScaleError: samples that say nothing of the couplings.
        """
        found = resolve_targets(model, targets)
        if len(found) != 1:
            raise TargetError(f"{', '.join(map(str, found))}: expected the one weight of LocalFields")
        assign(found[0].parameter, COUPLINGS[solution](_samples(batches, found[0].parameter)))


def _samples(batches: Iterable[Any], weight: Tensor) -> Tensor:
    spins = torch.cat([batch[0] for batch in batches]).float().cpu()
    if tuple(weight.shape) != (2, *spins.shape[1:]):
        raise PIBiNNError(
            f"samples of shape {tuple(spins.shape)} and a weight of shape {tuple(weight.shape)}: for couplings on a "
            f"torus of rows × columns they are (samples, rows, columns) and (2, rows, columns)"
        )
    return spins
