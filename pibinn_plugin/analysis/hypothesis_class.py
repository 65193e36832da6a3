r"""The networks that training could have given: how many there are, up to a change of the loss by a given resolution.

A member of the class is an iteration x ← soft(x + g_k W_k (y - A x), θ_k), k = 1 ... K, x = 0 at the start, with A
fixed, |g_k| ≤ G, 0 ≤ θ_k ≤ Θ, and weights of a fixed structure M with |W_k| ≤ Λ in every entry:

- ``one-bit``: W = λ S ⊙ M, one λ for all layers. 2^nnz sign patterns; nnz counts a tied weight once.
- ``channel-wise``: 2^nnz sign patterns and one scale for each row of each weight.
- ``ternary``: W = λ S ⊙ M with S in {-1, 0, 1}: 3^nnz patterns.
- ``float``: every structural nonzero is a parameter of its own.

**Lipschitz constants.** Let ‖y‖ ≤ R, let ‖M_k‖ be the spectral norm of the structure as a matrix of zeros and ones, and
let a = G Λ max_k ‖M_k‖ ‖A‖. ‖W_k‖ ≤ Λ ‖M_k‖, since absolute values of the entries never lower a spectral norm; S = +1
attains it. Soft-thresholding is nonexpansive and keeps 0, hence ‖x_{k+1}‖ ≤ (1 + a) ‖x_k‖ + (a / ‖A‖) R, which gives
‖y - A x_k‖ ≤ (1 + a)^k R by induction. For a second member, with primes,

.. math:: \|x_{k+1} - x'_{k+1}\| \le (1 + a) \|x_k - x'_k\| + \|g_k W_k - g'_k W'_k\| (1 + a)^k R
    + \sqrt n\, |\theta_k - \theta'_k|,

so that the output of layer K, with layers counted from 0, is Lipschitz with the constants

.. math:: (1 + a)^{K-1} R\, Λ \|M_k\| \text{ in } g_k, \quad (1 + a)^{K-1} R\, G \|M_k\| \text{ in } \max_{ij} |W_k|,
    \quad (1 + a)^{K-1-k} \sqrt n \text{ in } θ_k;

a weight of several layers has the sum of their constants, and so has λ, the scale of all. A rectangular grid of the
float parameters, fine enough for each of the d parameters (a weight whose entries change together is one) to
contribute resolution / d, is the cover; where it would have more points than float32 has values, 2^32, the float32
values take its place: networks are stored in float32. Where A and W are block-diagonal, norms are those of the largest
block.

Coverings of this kind, of thresholding networks with float weights: Behboodi, Rauhut and Schnoor, "Compressive sensing
and neural networks from a statistical learning perspective", 2022; Schnoor, Behboodi and Rauhut, "Generalization error
bounds for iterative recovery algorithms unfolded as neural networks", Information and Inference, 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pibinn_plugin.analysis.unrolled import Unrolled
from pibinn_plugin.errors import PIBiNNError

__all__ = ["KINDS", "Box", "UnrolledClass", "unrolled_class"]

KINDS = ("one-bit", "ternary", "channel-wise", "float")
_SYMBOLS = {"one-bit": 2, "ternary": 3, "channel-wise": 2, "float": 1}  # values of an entry, its scale apart
_SCALARS = ("step_size", "threshold")


@dataclass(frozen=True)
class Box:
    """Bounds of the float parameters and of the measurements, fixed before the data are seen.

    Args:
        weight: Λ, of λ, of channel scales, of the magnitude of float weights.
        step_size: G, of |g_k|.
        threshold: Θ, of θ_k.
        measurement: R, of ‖y‖.
    """

    weight: float
    step_size: float
    threshold: float
    measurement: float


@dataclass(frozen=True)
class UnrolledClass:
    """What the size of the class depends on; `unrolled_class` reads it off a network.

    Args:
        operator_norm: ‖A‖.
        unknowns: n.
        weight_of_layer: the index of the weight that each layer uses; tied layers use the same.
        nonzeros: structural nonzeros of each weight.
        rows: rows of each weight.
        structure_norms: ‖M‖ of each weight.
    """

    operator_norm: float
    unknowns: int
    weight_of_layer: tuple[int, ...]
    nonzeros: tuple[int, ...]
    rows: tuple[int, ...]
    structure_norms: tuple[float, ...]

    def log_lipschitz(self, box: Box) -> dict[str, list[float]]:
        """Natural logarithms of the constants of the module's docstring (which overflow in deep networks).

        Returns:
            ``step_size`` and ``threshold`` of each layer, ``weight`` of each weight, and ``scale`` (one entry), of λ.
        """
        norms = [self.structure_norms[index] for index in self.weight_of_layer]
        growth = math.log1p(box.step_size * box.weight * max(norms) * self.operator_norm)
        layers = len(norms)
        common = (layers - 1) * growth + math.log(box.measurement)
        uses = [self.weight_of_layer.count(index) for index in range(len(self.nonzeros))]
        weights = [use * norm for use, norm in zip(uses, self.structure_norms, strict=True)]
        return {
            "step_size": [common + math.log(box.weight * norm) for norm in norms],
            "threshold": [(layers - 1 - k) * growth + math.log(self.unknowns) / 2 for k in range(layers)],
            "weight": [common + math.log(box.step_size * weight) for weight in weights],
            "scale": [common + math.log(box.step_size * sum(norms))],
        }

    def log_radii(self, kind: str, box: Box, resolution: float) -> dict[str, list[float]]:
        """Logarithms of how far each float parameter may be from the grid, by the names of `log_lipschitz`."""
        scales = "scale" if _has_one_scale(kind) else "weight"
        constants = {name: values for name, values in self.log_lipschitz(box).items() if name in (*_SCALARS, scales)}
        share = math.log(resolution / sum(map(len, constants.values())))
        return {name: [share - constant for constant in values] for name, values in constants.items()}

    def log_size(self, kind: str, box: Box, resolution: float) -> float:
        """The natural logarithm of the size of a cover of the class.

        Args:
            kind: one of ``KINDS``.
            box: the bounds of the parameters.
            resolution: the largest change of the network's output (Euclidean norm) to the nearest of the cover.

        Raises:
            ValueError: another kind, or a resolution or a bound of the box that is not positive and finite.

        Example:
            >>> network = UnrolledClass(1.0, 3, (0, 0), nonzeros=(10,), rows=(3,), structure_norms=(3.0,))
            >>> sizes = [network.log_size(kind, Box(1.0, 1.0, 1.0, 1.0), resolution=0.1) for kind in KINDS]
            >>> [round(size / math.log(2)) for size in sizes]  # bits
            [51, 56, 69, 134]
        """
        bounds = (box.weight, box.step_size, box.threshold, box.measurement, resolution)
        if kind not in KINDS or not all(0 < bound < math.inf for bound in bounds):
            raise ValueError(f"kind={kind!r}, {box}, resolution={resolution}: expected one of {KINDS}, and bounds > 0")
        radii = self.log_radii(kind, box, resolution)
        size = sum(self.nonzeros) * math.log(_SYMBOLS[kind])
        size += sum(_log_points(2 * box.step_size, radius) for radius in radii["step_size"])
        size += sum(_log_points(box.threshold, radius) for radius in radii["threshold"])
        if _has_one_scale(kind):
            return size + _log_points(box.weight, radii["scale"][0])
        counts, length = (self.nonzeros, 2 * box.weight) if kind == "float" else (self.rows, box.weight)
        pairs = zip(counts, radii["weight"], strict=True)
        return size + sum(count * _log_points(length, radius) for count, radius in pairs)


def _has_one_scale(kind: str) -> bool:
    return kind in ("one-bit", "ternary")


def _log_points(length: float, log_radius: float) -> float:
    """The log of the points that a grid needs to have one this near everywhere; ⌈t⌉ is at most t + 1."""
    log_ratio = math.log(length / 2) - log_radius
    return 0.0 if log_ratio <= 0 else min(log_ratio + math.log1p(math.exp(-log_ratio)), 32 * math.log(2))


def unrolled_class(unrolled: Unrolled, weight_of_layer: tuple[int, ...] | None = None) -> UnrolledClass:
    """The class of the networks with the operator, the depth and the structure of this one.

    Structural nonzeros are the entries of a weight that are not zero.

    Args:
        unrolled: the network.
        weight_of_layer: for each layer the first layer that has the same weight; by default no weight is shared.

    Raises:
        PIBiNNError: a weight without a nonzero.

    Example:
        >>> unrolled = Unrolled(torch.ones(2, 3, 4), torch.ones(5, 2, 4, 3), torch.ones(5))
        >>> found = unrolled_class(unrolled)
        >>> sum(found.nonzeros), sum(found.rows), sum(unrolled_class(unrolled, (0, 0, 0, 3, 3)).nonzeros)
        (120, 40, 48)
    """
    owners = tuple(range(len(unrolled.weights))) if weight_of_layer is None else weight_of_layer
    distinct = sorted(set(owners))
    structures = [(unrolled.weights[index] != 0).double() for index in distinct]
    for index, structure in zip(distinct, structures, strict=True):
        if not structure.any():
            raise PIBiNNError(f"the weight of layer {index} has no nonzero: the class has nothing to choose there")
    blocks, n = len(unrolled.operator), unrolled.operator.shape[-1]
    return UnrolledClass(
        operator_norm=_norm(unrolled.operator),
        unknowns=blocks * n,
        weight_of_layer=tuple(distinct.index(owner) for owner in owners),
        nonzeros=tuple(int(structure.sum()) for structure in structures),
        rows=tuple(int(structure.any(-1).sum()) for structure in structures),
        structure_norms=tuple(_norm(structure) for structure in structures),
    )


def _norm(blocks: Tensor) -> float:
    return float(torch.linalg.matrix_norm(blocks, 2).max())
