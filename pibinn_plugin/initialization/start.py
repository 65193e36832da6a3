"""Where training starts: weights from training pairs or from a known operator, in place of random signs.

`TwoStageQAT` takes a `SignsFromPairs` or a `SignsFromOperator` as its ``initialization``; both also work on any
prepared model. `start_float_weights` gives float and other baselines their own start from the same pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from pibinn_plugin.errors import PIBiNNError, StructureError, TargetError
from pibinn_plugin.initialization.sign_recovery import pairs_for_signs, signs_determined
from pibinn_plugin.initialization.sign_regression import (
    OneBitStart,
    PairStatistics,
    box_weights,
    one_bit_latent,
    one_bit_start,
    ridge_weights,
)
from pibinn_plugin.quantizer import initial_scale
from pibinn_plugin.sharding import assign
from pibinn_plugin.structure import Shape, Structure
from pibinn_plugin.structure.base import matrix_shape
from pibinn_plugin.targets import Targets, resolve_targets
from pibinn_plugin.weights import OneBitWeight, global_scale, quantized_weights

Solution = Literal["ridge", "box", "one_bit", "signs"]  # see `start_float_weights`
SOLUTIONS: tuple[Solution, ...] = get_args(Solution)

_ROUNDING = 1e-6  # of the energy of an operator
_PROBES = 256  # unit vectors given to an operator at a time


class Initialization(Protocol):
    """Sets latents and λ of a prepared model, in place."""

    def __call__(
        self, model: nn.Module, batches: Iterable[Any], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Args: ``batches`` of training data; ``sum_over_ranks``, the all-reduce of a distributed training."""


@runtime_checkable
class StartsFloatWeights(Initialization, Protocol):
    """An `Initialization` that also starts float weights, from the same data: those of baselines that are compared."""

    solutions: Sequence[str]
    """The names of what they may start at, to choose among."""
    weights: str
    """Pattern of the names that the weights had before the model was prepared."""

    def start_float_weights(
        self, model: nn.Module, targets: Mapping[str, Structure | None], batches: Iterable[Any], solution: str
    ) -> None:
        """Set the weights of a model that is not prepared, in place, to one of the solutions."""


class SignsFromPairs:
    """Start one-bit weights at the signs and the λ that map inputs to outputs best: see `one_bit_start`.

    For a weight that stands for a physical operator, pairs are (unknowns, measurements). Every weight that is named
    gets the same start; λ is that of the whole network, so weights that are not named keep their signs and get it too.
    A subclass whose pairs are not simply entries of a batch overrides `read`.

    A UserWarning says where the pairs are too few for the rows of the structure: see `pairs_for_signs`.

    Args:
        inputs: where a batch holds the inputs of the weight, (batch, columns): an index, or a key.
        outputs: where it holds what the weight should map them to, (batch, rows).
        max_pairs: read no more than these, on each rank; all batches unless given.
        weights: pattern of the names that the weights had before the model was prepared; all weights unless given.
        scale: λ, where it is known; estimated unless given.

    Raises:
        PIBiNNError: ``max_pairs`` below 1, or inputs and outputs in one place.

    Example:
        >>> import pibinn_plugin as pb
        >>> model = pb.prepare(nn.Linear(6, 4, bias=False), {"weight": pb.BlockDiagonal(2)})
        >>> operator = torch.block_diag(torch.ones(2, 3), -torch.ones(2, 3))
        >>> unknowns = torch.randn(30, 6)
        >>> SignsFromPairs()(model, [(unknowns @ operator.T, unknowns)])
        >>> torch.allclose(model.weight, operator)
        True
    """

    solutions: Sequence[str] = SOLUTIONS

    def __init__(
        self,
        inputs: int | str = 1,
        outputs: int | str = 0,
        max_pairs: int | None = None,
        weights: str = "*",
        scale: float | None = None,
    ) -> None:
        if max_pairs is not None and max_pairs < 1:
            raise PIBiNNError(f"max_pairs={max_pairs}: expected at least one pair, or None for all")
        if inputs == outputs:
            raise PIBiNNError(
                f"inputs and outputs are both at {inputs!r} of a batch: every weight would be the identity"
            )
        self.inputs, self.outputs, self.max_pairs, self.weights = inputs, outputs, max_pairs, weights
        self.scale = scale

    def read(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The inputs (pairs, columns) and the outputs (pairs, rows) of a batch.

        Raises:
            PIBiNNError: a batch without such entries.
        """
        return _entry(batch, self.inputs, "inputs"), _entry(batch, self.outputs, "outputs")

    def pairs(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs and outputs of batch after batch, up to ``max_pairs``.

        Example:
            >>> [len(inputs) for inputs, outputs in SignsFromPairs(max_pairs=5).pairs([torch.ones(2, 3, 4)] * 9)]
            [3, 2]
        """
        left = self.max_pairs
        for batch in batches:
            inputs, outputs = (values[:left] for values in self.read(batch))
            yield inputs, outputs
            if left is not None and (left := left - len(inputs)) == 0:
                return

    def __call__(
        self, model: nn.Module, batches: Iterable[Any], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Set latents and λ from the pairs in the batches.

        Raises:
            TargetError: no weight of that name, or weights of several shapes or structures.
            PIBiNNError: batches without such entries, entries of other shapes, no pairs, or values that are not finite.
            ScaleError: a scale that is not positive, or outputs that the inputs say nothing of.
        """
        weights = _named_weights(model, self.weights)
        statistics = PairStatistics(*_common_structure(weights), weights[0].latent.device)
        for inputs, outputs in self.pairs(batches):
            statistics.add(inputs, outputs)
        if sum_over_ranks is not None:
            statistics.reduce(sum_over_ranks)
        _warn_of_too_few(statistics)
        _start(model, weights, one_bit_start(statistics, self.scale))

    def start_float_weights(
        self, model: nn.Module, targets: Mapping[str, Structure | None], batches: Iterable[Any], solution: str
    ) -> None:
        """Set float weights from the pairs in the batches: see the function `start_float_weights`."""
        start_float_weights(model, targets, self.pairs(batches), cast(Solution, solution), self.scale)


class SignsFromOperator:
    """Start one-bit weights at the signs of a known operator A, or of Aᵀ, with the λ that fits it best.

    Args:
        operator: a matrix, or an object with ``A`` and ``A_adjoint`` (which is probed with unit vectors).
        adjoint: whether the weight stands for Aᵀ rather than for A.
        weights: pattern of the names that the weights had before the model was prepared; all weights unless given.

    Example:
        >>> import pibinn_plugin as pb
        >>> model = pb.prepare(nn.Linear(4, 6, bias=False), {"weight": pb.BlockDiagonal(2)})
        >>> SignsFromOperator(torch.block_diag(torch.ones(2, 3), -torch.ones(2, 3)), adjoint=True)(model)
        >>> model.weight[:, 0].tolist(), pb.global_scale(model)().item()
        ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], 1.0)
    """

    def __init__(self, operator: nn.Module | Tensor, adjoint: bool = False, weights: str = "*") -> None:
        self.operator, self.adjoint, self.weights = operator, adjoint, weights

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any] = (),
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Set latents and λ from the operator; batches are not read.

        Raises:
            TargetError: no weight of that name, or weights of several shapes or structures.
            StructureError: an operator of another shape.
            ScaleError: an operator that is zero or not finite inside the structure.
        """
        weights = _named_weights(model, self.weights)
        structure, shape = _common_structure(weights)
        _start(model, weights, signs_from_operator(self.operator, structure, shape, self.adjoint))


def signs_from_operator(operator: Any, structure: Structure, shape: Shape, adjoint: bool = False) -> OneBitStart:
    """The signs of a known A, or of Aᵀ, inside a structure, with the λ that fits best: the mean magnitude there.

    Args:
        operator: a matrix, or an object with ``A`` and ``A_adjoint``; 256 columns of it are held at a time.
        structure: of the weight.
        shape: of the dense weight.
        adjoint: whether the weight stands for Aᵀ.

    Raises:
        StructureError: an operator or a structure of another shape, or a complex operator.
        ScaleError: an operator that is zero or not finite inside the structure.

    Warns:
        UserWarning: the operator has entries outside of the structure that are more than rounding.

    Example:
        >>> from pibinn_plugin.structure import Dense
        >>> signs_from_operator(torch.tensor([[0.5, -1.5]]), Dense(), (1, 2))
        OneBitStart(latent=tensor([[ 0.5000, -1.5000]]), scale=1.0)
    """
    values = operator_entries(operator, structure, shape, adjoint)
    scale = initial_scale([values])
    return OneBitStart(one_bit_latent(torch.where(values >= 0, 1.0, -1.0), values, scale), scale)


def operator_entries(operator: Any, structure: Structure, shape: Shape, adjoint: bool = False) -> Tensor:
    """The entries of a known A, or of Aᵀ, inside a structure, in compact form.

    Args, errors and warnings are those of `signs_from_operator`, which takes their signs.

    Example:
        >>> from pibinn_plugin.structure import BlockDiagonal
        >>> operator_entries(torch.tensor([[0.5, 0.0], [0.0, 2.0]]), BlockDiagonal(2), (2, 2)).tolist()
        [[[0.5]], [[2.0]]]
    """
    structure.check(shape)
    rows, columns = matrix_shape(shape)
    apply = _linear_map(operator, adjoint, rows, columns)
    positions = structure.positions(shape)
    row_of, column_of = positions // columns, positions % columns
    values, energy = torch.empty(len(positions), device="cpu"), 0.0
    for first in range(0, columns, _PROBES):
        units = torch.zeros(min(_PROBES, columns - first), columns, device="cpu")
        units.diagonal(first).fill_(1.0)
        images = apply(units).detach().cpu()
        if images.is_complex():
            raise StructureError(f"the operator is {images.dtype}, and weights are real")
        here = ((column_of >= first) & (column_of < first + len(units))).nonzero().flatten()
        values[here] = images[column_of[here] - first, row_of[here]].float()
        energy += float(images.double().square().sum())
    outside = 1 - float(values.double().square().sum()) / energy if energy > 0 else 0.0
    if outside > _ROUNDING:
        warnings.warn(
            f"{outside:.2%} of the energy of the operator, the sum of its squared entries, lies outside of "
            f"{structure}, where no weight stands for it; structure_from_operator gives the structure of all of it",
            stacklevel=2,
        )
    return values.reshape(structure.compact_shape(shape))


def start_float_weights(
    model: nn.Module,
    targets: Targets,
    pairs: Iterable[tuple[Tensor, Tensor]],
    solution: Solution = "box",
    scale: float | None = None,
) -> None:
    """Give float weights the start that one-bit weights get from pairs: for twins and baselines that are compared.

    Args:
        model: one that is not prepared, changed in place.
        targets: pattern of parameter names to structure, see `resolve_targets`; all of one structure and shape.
        pairs: batches of inputs (pairs, columns) and outputs (pairs, rows) of the weight.
        solution: of one least-squares problem: ``ridge`` and ``box``, those of `ridge_weights` and `box_weights`;
            ``one_bit``, the latents of `one_bit_start`; or ``signs``, the weights λ S that one-bit weights have then.
        scale: λ of the last three, where it is known; estimated unless given.

    Raises:
        TargetError: no weight of that name, or weights of several shapes or structures.
        PIBiNNError: an unknown solution, pairs of other shapes, no pairs, or values that are not finite.
        ScaleError: a scale that is not positive, or outputs that the inputs say nothing of.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> start_float_weights(model, {"weight": None}, [(torch.eye(2), torch.tensor([[1.0], [-1.0]]))])
        >>> model.weight.tolist()
        [[1.0, -1.0]]
    """
    found = resolve_targets(model, targets)
    structure, shape = _one_of([(target.structure, target.shape) for target in found], [str(each) for each in found])
    statistics = PairStatistics(structure, shape, found[0].parameter.device)
    for inputs, outputs in pairs:
        statistics.add(inputs, outputs)
    if solution == "ridge":
        weight = ridge_weights(statistics)
    elif solution == "box":
        weight = box_weights(statistics, scale).latent
    elif solution in ("one_bit", "signs"):
        start = one_bit_start(statistics, scale)
        weight = start.latent if solution == "one_bit" else start.weight
    else:
        raise PIBiNNError(f"unknown solution {solution!r}; expected one of {', '.join(SOLUTIONS)}")
    for target in found:
        assign(target.parameter, weight if target.compact else structure.to_dense(weight, shape))


def _warn_of_too_few(statistics: PairStatistics) -> None:
    """Say where even without noise the pairs leave signs of a row open."""
    unknowns = max(group.columns.shape[1] for group in statistics.groups)
    if 0 < statistics.pairs < (needed := pairs_for_signs(unknowns)):
        warnings.warn(
            f"{statistics.pairs} pairs for rows of {unknowns} unknown signs: even without noise they determine all "
            f"signs of a row with probability {signs_determined(statistics.pairs, unknowns):.2g} only; {needed} pairs "
            f"do so in 99 of 100 rows. Expect wrong signs, or give more pairs",
            stacklevel=3,
        )


def _linear_map(operator: Any, adjoint: bool, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """The map from (batch, columns) to (batch, rows) that A, or Aᵀ, is."""
    expected = (columns, rows) if adjoint else (rows, columns)
    if tuple(getattr(operator, "shape", expected)) != expected:
        raise StructureError(
            f"the operator has shape {tuple(operator.shape)}; a weight of {rows} x {columns} that stands for "
            f"{'its adjoint' if adjoint else 'it'} needs {expected}"
        )
    if isinstance(operator, Tensor):
        matrix = operator.detach().cpu()
        matrix = matrix if matrix.is_complex() else matrix.float()
        return lambda units: units.to(matrix.dtype) @ (matrix if adjoint else matrix.mT)
    name = "A_adjoint" if adjoint else "A"
    if not callable(apply := getattr(operator, name, None)):
        raise StructureError(f"expected a matrix or an object with a method {name}; got {type(operator).__name__}")
    return apply


def _named_weights(model: nn.Module, pattern: str) -> list[OneBitWeight]:
    weights = quantized_weights(model)
    if not (named := [weight for weight in weights if fnmatchcase(weight.name, pattern)]):
        names = [weight.name for weight in weights]
        raise TargetError(f"{pattern!r} names no weight of the prepared model; there are {names[:8]}")
    return named


def _common_structure(weights: Sequence[OneBitWeight]) -> tuple[Structure, Shape]:
    return _one_of([(weight.structure, weight.shape) for weight in weights], [each.name for each in weights])


def _one_of(found: Sequence[tuple[Structure, Shape]], names: Sequence[str]) -> tuple[Structure, Shape]:
    for name, (structure, shape) in zip(names, found, strict=True):
        if (structure, shape) != found[0]:
            raise TargetError(
                f"weights that start alike must be alike: {names[0]} has the shape {found[0][1]} and {found[0][0]}, "
                f"{name} has {shape} and {structure}; name fewer"
            )
    return found[0]


def _entry(batch: Any, key: int | str, role: str) -> Tensor:
    try:
        entry = batch[key]
    except (TypeError, KeyError, IndexError):
        entry = None
    if not isinstance(entry, Tensor):
        raise PIBiNNError(
            f"the {role} of the pairs should be at {key!r} of a batch; got a {type(batch).__name__} without a tensor "
            f"there"
        )
    return entry


def _start(model: nn.Module, weights: Sequence[OneBitWeight], start: OneBitStart) -> None:
    for weight in weights:
        latent = start.latent if weight.compact else weight.structure.to_dense(start.latent, weight.shape)
        assign(weight.latent, latent)
    global_scale(model).set(start.scale)
