"""The verb ``analyze``: what `lightning_modules.analysis` has to say of one trained solver, as tables and plots.

Every solver gets what holds for it: generalization, sensitivity and the history of its signs need no form of the
iteration, geometry needs weights of the shape of a known operator, certificates of convergence and bounds of stability
the form of `CoupledISTA`. What does not apply is named, with the reason.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.analysis.code_length import code_lengths
from lightning_modules.analysis.comparison import compare_convergence, plain_ista
from lightning_modules.analysis.contraction import one_bit_existence, spectral_contraction
from lightning_modules.analysis.examples import on_device
from lightning_modules.analysis.forward_error import forward_error
from lightning_modules.analysis.generalization import generalization, separable_blocks
from lightning_modules.analysis.geometry import GeometryTable, network_geometry
from lightning_modules.analysis.network import CompactWeight, float_parameters, network_scale, one_bit_weights
from lightning_modules.analysis.phase_transition import measure_signs
from lightning_modules.analysis.plan import Plan
from lightning_modules.analysis.plots import (
    plot_bounds,
    plot_convergence,
    plot_pairs,
    plot_sign_history,
    plot_spectra,
    save_figure,
)
from lightning_modules.analysis.sensitivity import sensitivity
from lightning_modules.analysis.sign_history import SignHistory, read_sign_history
from lightning_modules.analysis.stability import stability
from lightning_modules.analysis.unrolled import LARGEST_DENSE, Unrolled, read_solver
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.modules import SolverModule
from lightning_modules.operators import operator_blocks
from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.initialization import SignsFromPairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Analysis", "Trained", "analyze", "plan_examples", "sign_logs"]

_ISOMETRY_SAMPLES = 8000  # sets of columns, in all blocks of a weight
_MOST_BLOCKS = 2000  # of all weights, beyond which only the first and the last are compared with the operator
_SENSITIVITY_ENTRIES = 1 << 18  # of the measurements of the examples


@dataclass(frozen=True)
class Trained:
    """A run, as far as the analysis needs it.

    Args:
        module: prepared, with the state of a checkpoint.
        untrained: the same, prepared, as the configuration makes it.
        float_twin: the same with trained float weights; None where there is none.
        data: of the run.
        epochs: that the training lasted.
        signs: the history of the signs; None where the run logged none.
        initialization: where the signs started from; None for the solver's own start.
    """

    module: SolverModule
    untrained: SolverModule
    float_twin: SolverModule | None
    data: pl.LightningDataModule
    epochs: int
    signs: SignHistory | None = None
    initialization: Any = None


@dataclass
class Analysis:
    """Titled texts, and figures by name; ``print`` shows the texts, `save_plots` draws the figures."""

    sections: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)

    def add(self, title: str, result: object) -> None:
        """Add a text, or why there is none."""
        self.sections.append((title, f"{result}\n".replace("\n\n", "\n")))

    def __str__(self) -> str:
        return "\n".join(f"== {title} ==\n{text}" for title, text in self.sections)

    def save_plots(self, folder: Path) -> list[Path]:
        """Draw everything into a folder."""
        return [save_figure(draw(), folder / f"{name}.png") for name, draw in self.figures.items()]


def analyze(run: Trained) -> Analysis:
    """Analyze a trained solver on the data of its run."""
    run.data.setup("fit")
    run.data.setup("test")
    report = Analysis()
    _add_generalization(report, run)
    _add_calibration(report, run)
    try:
        unrolled = read_solver(run.module.solver)
    except PIBiNNError as reason:
        report.add("Convergence, contraction and stability", _not_here(reason))
    else:
        _add_convergence(report, run, unrolled)
    y = next(iter(run.data.test_dataloader()))[0]
    report.add("Sensitivity", sensitivity(run.module, y[: max(1, _SENSITIVITY_ENTRIES // y[0].numel())][:64]))
    _add_geometry(report, run)
    none = "The run has no log with the flips of its signs."
    report.add("Signs during training", none if run.signs is None else run.signs)
    if (signs := run.signs) is not None:
        report.figures["signs"] = lambda: plot_sign_history(signs)
    return report


def _not_here(reason: object) -> str:
    return textwrap.fill(f"Not for this solver: {reason}.", 116)


def plan_examples(module: SolverModule, data: pl.LightningDataModule, gap: float) -> Plan:
    """How many examples a gap needs, for a prepared module; it need not be trained."""
    data.setup("fit")
    weights = one_bit_weights(module)
    blocks = separable_blocks(on_device(module), weights, data)
    return Plan(code_lengths(weights, float_parameters(module), blocks=blocks), gap, blocks)


def _add_generalization(report: Analysis, run: Trained) -> None:
    found = generalization(run.module, run.data, run.epochs, run.untrained, run.float_twin)
    report.add("Generalization", found)
    if not isinstance(code := found.code, str):
        report.figures["bounds"] = lambda: plot_bounds(code)


def _add_calibration(report: Analysis, run: Trained) -> None:
    """Of weights that were started from pairs of what they map."""
    if not isinstance(run.initialization, SignsFromPairs):
        return
    weights = one_bit_weights(run.module)
    if len(weights) > 1:
        report.add("Calibration", f"Not for {len(weights)} weights that start alike: which one maps the pairs?")
        return
    [weight] = weights
    error = forward_error(weight, network_scale(run.module), run.initialization, run.data)
    missing = f"No bound: {error}."
    report.add("Error of the calibrated operator on new pairs", missing if isinstance(error, str) else error)
    if isinstance(run.data, SparseRecovery) and tuple(run.data.operator.shape) == tuple(weight.shape):
        curve = measure_signs(run.data, weight.structure, weight.shape)
        report.add("How many pairs find the signs", curve)
        report.figures["pairs"] = lambda: plot_pairs(curve)


def _add_convergence(report: Analysis, run: Trained, unrolled: Unrolled) -> None:
    start = read_solver(run.untrained.solver)
    assert start.thresholds is not None  # a solver has them
    networks = {"one-bit": unrolled}
    if run.float_twin is not None:
        networks["float twin"] = read_solver(run.float_twin.solver)
    networks["plain ISTA"] = plain_ista(unrolled.operator, start.thresholds)
    y, x = (torch.cat(parts) for parts in zip(*run.data.test_dataloader(), strict=True))
    convergence = compare_convergence(networks, y, x)
    report.add("Convergence, side by side", convergence)
    for name, measured in convergence.measurements.items():
        report.add(f"Convergence certificate: {name}", f"{measured.certificate}\n{measured}")
    report.add("Spectral contraction of the one-bit layers", spectral_contraction(unrolled))
    existence = one_bit_existence(unrolled.operator[0])
    report.add("Can one-bit weights contract for block 0 of the operator", existence)
    report.add("Stability, layer by layer", stability(unrolled, y.unflatten(-1, (len(unrolled.operator), -1))))
    report.figures["convergence"] = lambda: plot_convergence(convergence)


def _add_geometry(report: Analysis, run: Trained) -> None:
    title = "Geometry of the weights against the operator"
    matrix = _operator_matrix(run)
    if isinstance(matrix, str):
        report.add(title, _not_here(matrix))
        return
    tables: dict[str, GeometryTable] = {}
    twins = {} if run.float_twin is None else {"float, trained": run.float_twin}
    weights, others = one_bit_weights(run.module), []
    few = weights if len(weights) * len(matrix) <= _MOST_BLOCKS else [weights[0], weights[-1]]
    for weight in few:
        if (fitting := _like(weight, matrix)) is None:
            others.append(weight.name)
            continue
        operator, adjoint = fitting
        samples = max(10, _ISOMETRY_SAMPLES // (operator.shape[0] if operator.dim() == 3 else 8))
        tables |= network_geometry(run.module, {weight.name: operator}, adjoint, twins, samples=min(1000, samples))
    if tables:
        report.add(title, _together(tables))
        report.figures["spectra"] = lambda: plot_spectra(list(tables.values())[-1])
    if len(few) < len(weights):
        report.add(f"{title}: left out", f"Of {len(weights)} weights of {len(matrix):,} blocks, all but two.")
    if others:
        report.add(f"{title}: left out", textwrap.fill(f"Not of the operator's shape: {', '.join(others)}.", 116))


def _operator_matrix(run: Trained) -> Tensor | str:
    """The blocks (blocks, m, n) of the operator that the data, or the solver, know; or why there is none."""
    operator = getattr(run.data, "operator", None)
    operator = getattr(run.module.solver, "operator", None) if operator is None else operator
    if operator is None or not hasattr(operator, "A"):
        return "it has no measurement operator that its weights could be compared with"
    if not hasattr(operator, "blocks") and operator.shape[0] * operator.shape[1] > LARGEST_DENSE:
        return f"an operator of {operator.shape} is too large for a matrix"
    if callable(matrix := getattr(operator, "matrix", None)):  # of patterns that measure blocks of images, or sparse
        return matrix().detach().to_dense()[None]
    return operator_blocks(operator)


def _like(weight: CompactWeight, blocks: Tensor) -> tuple[Tensor, bool] | None:
    """The operator in the form that a weight of its shape, or of its adjoint's, is compared with; and which it is."""
    count, m, n = blocks.shape
    shape = (count * m, count * n)
    if tuple(weight.shape) not in (shape, shape[::-1]):
        return None
    adjoint = tuple(weight.shape) != shape
    if count > 1 and weight.equal_blocks == count:
        return blocks, adjoint
    return (torch.block_diag(*blocks), adjoint) if shape[0] * shape[1] <= LARGEST_DENSE else None


def _together(tables: dict[str, GeometryTable]) -> GeometryTable:
    """One table, the operator's own row once."""
    first = next(iter(tables.values()))
    rows = {"(operator)": first.rows["(operator)"]}
    for name, table in tables.items():
        rows |= {f"{name}: {row}": found for row, found in table.rows.items() if row != "(operator)"}
    return GeometryTable(rows, first.shape, first.sparsity, first.samples, first.seed, "weight")


def sign_logs(root: Path) -> list[tuple[Path, SignHistory]]:
    """The logs of a run that have a history of signs, the newest first.

    Args:
        root: ``default_root_dir`` of the run.
    """
    logs = sorted(root.glob("lightning_logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    found = []
    for log in reversed(logs):
        with contextlib.suppress(PIBiNNError):  # a log of another verb, such as test
            found.append((log, read_sign_history(log)))
    return found
