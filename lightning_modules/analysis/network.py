"""What the analyses need to know of a prepared or packed network: its one-bit weights, and how many numbers are floats.

The one place of this package that reads the plugin's records of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pibinn_plugin import weights
from pibinn_plugin.structure import BlockDiagonal, Shape, Structure

__all__ = ["CompactWeight", "float_parameters", "network_scale", "one_bit_weights"]


@dataclass(frozen=True, eq=False)
class CompactWeight:
    """One weight ``λ · S ⊙ M``, in the compact form of its structure.

    Args:
        name: of the parameter, before the model was prepared.
        signs: S, ±1, the structural nonzeros.
        latent: V, of the same shape; None in a packed network.
        structure: M.
        shape: of the dense weight.
        parameter: what training changes; None in a packed network. It is the latent in the form the scheme keeps it.
    """

    name: str
    signs: Tensor
    latent: Tensor | None
    structure: Structure
    shape: Shape
    parameter: nn.Parameter | None = None

    @property
    def equal_blocks(self) -> int:
        """How many equal diagonal blocks the weight has, one after another; 1 where its structure has none."""
        if isinstance(self.structure, BlockDiagonal) and self.structure.rows is None and len(self.shape) == 2:
            return self.structure.compact_shape(self.shape)[0]
        return 1

    @property
    def row_nonzeros(self) -> Tensor:
        """The structural nonzeros of each row of the weight as a matrix, shape ``(rows,)``."""
        columns = torch.Size(self.shape[1:]).numel()
        return torch.bincount(self.structure.positions(self.shape) // columns, minlength=self.shape[0])


def one_bit_weights(model: nn.Module) -> list[CompactWeight]:
    """The one-bit weights of a prepared or packed model, each once.

    Example:
        >>> from pibinn_plugin import BlockDiagonal, convert, prepare
        >>> model = prepare(nn.Sequential(nn.Linear(8, 4)), {"0.weight": BlockDiagonal(2)})
        >>> [weight] = one_bit_weights(model)
        >>> weight.name, weight.signs.shape, weight.equal_blocks, one_bit_weights(convert(model))[0].latent
        ('0.weight', torch.Size([2, 2, 4]), 2, None)
    """
    found = []
    for weight in weights.one_bit_weights(model):
        latent, parameter = None, None
        if not weight.is_packed:
            parameter = weight.latent
            latent = weight.quantizer.structural(parameter).reshape(weight.structure.compact_shape(weight.shape))
        signs = weight.packed.signs()
        found.append(CompactWeight(weight.name, signs, latent, weight.structure, weight.shape, parameter))
    return found


def network_scale(model: nn.Module) -> float:
    """λ of a prepared or packed model.

    Raises:
        ScaleError: the model has no or several λ.
    """
    return weights.global_scale(model)().item()


def float_parameters(model: nn.Module) -> int:
    """How many numbers a prepared model trains beside its latents, λ among them.

    Example:
        >>> from pibinn_plugin import prepare
        >>> float_parameters(prepare(nn.Linear(8, 4), {"weight": None}))  # the bias and λ
        5
    """
    latents = {id(weight.parameter) for weight in one_bit_weights(model)}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in latents)
