r"""Does an unrolled solver generalize: bounds of the train-test gap from its class, and the gap measured beside them.

The loss of an example is ℓ = min(1, ‖x̂ - x‖² / c), and 1 where ‖y‖ > R: it lies in [0, 1], and c and R are numbers that
do not depend on the network. `hypothesis_class` counts the networks that training could have given, `finite_class`
bounds how far the mean loss of any of them over the distribution can be above its mean over N training examples. ℓ
changes by at most 2/√c times the output, so that a cover of the outputs to τ √c / 2 is one of the losses to τ; here
τ = 1/N.

The class must not depend on the data. Its box (bounds of the weights, step sizes and thresholds), R and c are powers of
two between 2^-64 and 2^63, the smallest that hold this network and these training data; the bounds hold for all 128^5
choices at once, with δ / 128^5 spent on each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.analysis.finite_class import RISK_BOUNDS, required_examples, risk_bounds
from lightning_modules.analysis.hypothesis_class import KINDS, Box, UnrolledClass, unrolled_class
from lightning_modules.analysis.unrolled import Unrolled, read_solver
from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.tables import text_table

__all__ = ["ClassBounds", "Generalization", "generalization_bounds", "tied_layers"]

Examples = tuple[Tensor, Tensor]

_EXPONENTS = range(-64, 64)
_CHOICES = 5 * math.log(len(_EXPONENTS))  # bounds of weights, step sizes, thresholds and measurements, and c


@dataclass(frozen=True)
class ClassBounds:
    """Bounds for one class of networks, beside the losses of its network where there is one.

    Args:
        kind: of the class.
        network_class: what its size depends on.
        box: bounds of its parameters.
        clip: c.
        examples: N.
        train_loss: measured, of the network of this class; that of the first network where there is none.
        test_loss: measured; None where there is no network of this class.
        failure_probability: δ, of each bound.
    """

    kind: str
    network_class: UnrolledClass
    box: Box
    clip: float
    examples: int
    train_loss: float
    test_loss: float | None
    failure_probability: float

    def log_size(self, examples: int | None = None) -> float:
        """The natural logarithm of the size of the cover for N examples."""
        resolution = math.sqrt(self.clip) / (2 * (examples or self.examples))
        return self.network_class.log_size(self.kind, self.box, resolution)

    def gaps(self, examples: int | None = None) -> dict[str, float]:
        """Bounds of the mean loss over the distribution less the train loss, by the names of ``RISK_BOUNDS``."""
        n = examples or self.examples
        each = self.failure_probability * math.exp(-_CHOICES)
        bounds = risk_bounds(self.log_size(n), n, self.train_loss, 1 / n, each)
        return {name: bound - self.train_loss for name, bound in bounds.items()}

    @property
    def vacuous(self) -> dict[str, bool]:
        """Whether a bound says nothing: the train loss and the bound of the gap make 1 or more, the largest loss."""
        return {name: self.train_loss + gap >= 1 for name, gap in self.gaps().items()}

    def examples_for(self, name: str, target_gap: float) -> int | None:
        """The N at which a bound of the gap is ``target_gap``, at this train loss; None where no N is enough."""
        return required_examples(lambda n: self.gaps(n)[name], target_gap)


@dataclass(frozen=True)
class Generalization:
    """Bounds of all classes by kind; ``print`` shows them beside the gap that was measured.

    Args:
        classes: by kind.
        target_gap: that the last columns ask the N for.
        test_examples: over which test losses are means.
    """

    classes: Mapping[str, ClassBounds]
    target_gap: float
    test_examples: int

    def __str__(self) -> str:
        header = ["class", "log2 size", *RISK_BOUNDS, "train loss", "test loss", "gap", "vacuous"]
        rows = [_cells(bounds) for bounds in self.classes.values()]
        needed = [[kind, *self._needed(bounds)] for kind, bounds in self.classes.items()]
        return (
            text_table(header, rows, left_columns=1)
            + self._verdict()
            + text_table([f"N for a gap of {self.target_gap:g}", *RISK_BOUNDS], needed, left_columns=1)
            + self._assumptions()
        )

    def _needed(self, bounds: ClassBounds) -> list[str]:
        counts = [bounds.examples_for(name, self.target_gap) for name in RISK_BOUNDS]
        return ["none" if count is None else f"{count:.3g}" for count in counts]

    def _verdict(self) -> str:
        n = next(iter(self.classes.values())).examples
        vacuous = {kind: list(bounds.vacuous.values()) for kind, bounds in self.classes.items()}
        if all(all(flags) for flags in vacuous.values()):
            return f"VACUOUS at N = {n:,}: every bound of every class allows the largest loss there is.\n"
        which = [kind for kind, flags in vacuous.items() if not all(flags)]
        return f"At N = {n:,}, a bound that is not vacuous: {', '.join(which)}.\n"

    def _assumptions(self) -> str:
        first = next(iter(self.classes.values()))
        return _LEGEND.format(
            n=first.examples,
            c=first.clip,
            r=first.box.measurement,
            failure=first.failure_probability,
            test=self.test_examples,
        )


_LEGEND = """\
Bounds of (mean loss over the distribution) - (train loss), each with probability {failure:g} of failing, for every
network of the class at once. Assumed: {n:,} training examples, independent, of one distribution; A and the structure
known in advance. loss: min(1, |x^ - x|^2 / {c:g}), 1 where |y| > {r:g}; vacuous: train loss + bound >= 1, the largest.
log2 size: bits that tell the networks of the class apart to a loss of 1/N; tied weights and the one scale count once.
global: Massart, McDiarmid. local: Bartlett, Bousquet, Mendelson 2005, Theorem 3.3, first part; star: second part.
union: Bernstein. Train and test losses are measured, of this network or its twin (test: {test:,} examples); a class
without a network of its own has the train loss of the first. Theorems: analysis/finite_class.py, hypothesis_class.py.
"""


def _cells(bounds: ClassBounds) -> list[str]:
    vacuous = bounds.vacuous
    which = "all" if all(vacuous.values()) else ", ".join(name for name, flag in vacuous.items() if flag) or "none"
    measured = ["", "", ""]
    if bounds.test_loss is not None:
        gap = bounds.test_loss - bounds.train_loss
        measured = [f"{number:.4g}" for number in (bounds.train_loss, bounds.test_loss, gap)]
    gaps = [f"{gap:.4g}" for gap in bounds.gaps().values()]
    return [bounds.kind, f"{bounds.log_size() / math.log(2):,.0f}", *gaps, *measured, which]


def generalization_bounds(
    solver: Any,
    train: Examples,
    test: Examples,
    twins: Mapping[str, Any] | None = None,
    target_gap: float = 0.1,
    failure_probability: float = 0.05,
) -> Generalization:
    """Bound the train-test gap of a trained solver, and of solvers of other weights in its place.

    Args:
        solver: of the form that `read_solver` takes; one-bit.
        train: y, shape ``(N, measurements)``, and x, shape ``(N, unknowns)``, that the solver was trained on. Where
            more examples were used, any N of them do, chosen without looking at them.
        test: y and x that it was not trained on.
        twins: trained solvers of the same structure with other weights, by their kind (``KINDS``).
        target_gap: to tell the N for.
        failure_probability: δ.

    Raises:
        PIBiNNError: a solver of another form or with several magnitudes, a twin of another kind, depth or operator, a
            number out of the range of the box.
        ValueError: examples that do not fit the operator, a gap or a probability outside (0, 1).

    Example:
        >>> class OneLayer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 4, bias=False)])
        ...         torch.nn.init.ones_(self.layers[0].weight)
        ...         self.step_sizes, self.thresholds = torch.ones(1), torch.zeros(1)
        ...         self.operator = type("Operator", (), {"blocks": torch.ones(1, 3, 4)})
        ...     def forward(self, y):
        ...         return self.layers[0](y)
        >>> y, x = torch.randn(200, 3), torch.randn(200, 4)
        >>> report = generalization_bounds(OneLayer(), (y[:100], x[:100]), (y[100:], x[100:]))
        >>> report.classes["one-bit"].vacuous["union"], report.classes["one-bit"].examples_for("union", 0.1) > 1000
        (True, True)
    """
    _check_fractions(target_gap, failure_probability)
    networks = {"one-bit": solver, **(twins or {})}
    unrolled = _read(networks)
    first = unrolled["one-bit"]
    for examples in (train, test):
        _check(examples, first)
    clip = _power_of_two("the mean energy of x", float(train[1].double().square().sum(-1).mean()))
    radius = _power_of_two("the largest norm of y", float(train[0].double().norm(dim=-1).max()))
    network_class = unrolled_class(first, tied_layers(solver))
    losses = {
        kind: tuple(_mean_loss(network, examples, clip, radius) for examples in (train, test))
        for kind, network in networks.items()
    }
    classes = {}
    for kind in KINDS:
        box, train_loss = _box(unrolled.get(kind, first), radius), losses.get(kind, losses["one-bit"])[0]
        test_loss = losses[kind][1] if kind in losses else None
        measured = (len(train[0]), train_loss, test_loss)
        classes[kind] = ClassBounds(kind, network_class, box, clip, *measured, failure_probability)
    return Generalization(classes, target_gap, len(test[0]))


def _check_fractions(target_gap: float, failure_probability: float) -> None:
    if not 0 < target_gap < 1 or not 0 < failure_probability < 1:
        raise ValueError(
            f"target_gap={target_gap}, failure_probability={failure_probability}: expected numbers between 0 and 1"
        )


def _read(networks: Mapping[str, Any]) -> dict[str, Unrolled]:
    """The iterations of the one-bit solver and its twins, which must fit each other."""
    if unknown := set(networks) - set(KINDS):
        raise PIBiNNError(f"twins of the kinds {', '.join(sorted(unknown))}; expected some of {', '.join(KINDS[1:])}")
    unrolled = {kind: read_solver(network) for kind, network in networks.items()}
    first = unrolled["one-bit"]
    magnitudes = first.weights.abs()[first.weights != 0]
    if len(magnitudes) and magnitudes.max() > magnitudes.min() * (1 + 1e-4):
        raise PIBiNNError(
            f"the solver's weights have magnitudes from {magnitudes.min():g} to {magnitudes.max():g}; expected one-bit "
            "weights with one scale: other networks go into twins"
        )
    for kind, other in unrolled.items():
        if other.weights.shape != first.weights.shape or not torch.equal(other.operator, first.operator):
            raise PIBiNNError(f"the {kind} twin has another operator or depth than the one-bit solver")
    return unrolled


def tied_layers(solver: Any) -> tuple[int, ...]:
    """For each layer the first one that has the same parameters: weights that are shared, and count once."""
    owners = [tuple(id(tensor) for tensor in (*layer.parameters(), *layer.buffers())) for layer in solver.layers]
    return tuple(owners.index(owner) for owner in owners)


def _check(examples: Examples, unrolled: Unrolled) -> None:
    blocks, m, n = unrolled.operator.shape
    shapes = [tuple(tensor.shape) for tensor in examples]
    count = len(examples[0])
    if count < 1 or shapes != [(count, blocks * m), (count, blocks * n)]:
        raise ValueError(f"examples of the shapes {shapes}; expected (N, {blocks * m}) and (N, {blocks * n})")
    if not all(tensor.isfinite().all() for tensor in examples):
        raise ValueError("the examples have an entry that is not finite")


def _power_of_two(name: str, value: float) -> float:
    """The smallest 2^k, k in -64 ... 63, that is not below."""
    exponent = max(_EXPONENTS[0], math.ceil(math.log2(value))) if value > 0 else _EXPONENTS[0]
    if exponent > _EXPONENTS[-1]:
        raise PIBiNNError(f"{name} is {value:g}; the bounds are for values of at most 2^63")
    return 2.0**exponent


def _box(unrolled: Unrolled, radius: float) -> Box:
    assert unrolled.thresholds is not None  # a solver has them
    weight = _power_of_two("the largest weight", float(unrolled.weights.abs().max()))
    step_size = _power_of_two("the largest step size", float(unrolled.step_sizes.abs().max()))
    return Box(weight, step_size, _power_of_two("the largest threshold", float(unrolled.thresholds.max())), radius)


def _mean_loss(solver: Any, examples: Examples, clip: float, radius: float) -> float:
    total, device, dtype = 0.0, solver.step_sizes.device, solver.step_sizes.dtype
    with torch.no_grad():
        for y, x in zip(*(tensor.split(1024) for tensor in examples), strict=True):
            estimate = solver(y.to(device, dtype)).double().cpu()
            loss = ((estimate - x.double().cpu()).square().sum(-1) / clip).clamp(max=1)
            total += float(torch.where(y.double().cpu().norm(dim=-1) > radius, 1.0, loss).sum())
    return total / len(examples[0])
