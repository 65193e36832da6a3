"""Plots of the analyses, one function a result object; lines differ by style and marker, so that they read in grey.

matplotlib comes with ``pip install pibinn-plugin[plot]`` and is imported when a plot is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.analysis.comparison import ConvergenceComparison
from lightning_modules.analysis.finite_class import RISK_BOUNDS
from lightning_modules.analysis.generalization import Generalization
from lightning_modules.analysis.geometry import GeometryTable
from lightning_modules.analysis.sign_history import SignHistory
from pibinn_plugin.atomic_file import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_bounds", "plot_convergence", "plot_sign_history", "plot_spectra", "save_figure"]

_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREYS = ("0.0", "0.35", "0.55", "0.2", "0.45", "0.65", "0.3")


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install pibinn-plugin[plot]") from error
    # No pyplot: it would keep every figure, and choose a display.
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(color="0.9")
    return figure, axes


def _styles() -> Iterator[dict[str, Any]]:
    for index in range(10**6):
        marker, grey = _MARKERS[index % len(_MARKERS)], _GREYS[index % len(_GREYS)]
        line = _LINES[index % len(_LINES)]
        yield {"linestyle": line, "marker": marker, "color": grey, "markersize": 4, "linewidth": 1.2}


def plot_convergence(comparison: ConvergenceComparison) -> Figure:
    """The error of each layer: measured mean as a line, certified error as hollow markers of the same shape.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_modules.analysis.comparison import compare_convergence, plain_ista
        >>> ista = plain_ista(torch.eye(4)[None], torch.full((3,), 0.1))
        >>> figure = plot_convergence(compare_convergence({"ISTA": ista}, torch.eye(4), torch.eye(4)))
        >>> figure.axes[0].get_yscale()
        'log'
    """
    figure, axes = _axes("Error after each layer", "layer", "‖e‖₁, summed over the blocks")
    for (name, measured), style in zip(comparison.measurements.items(), _styles(), strict=False):
        mean, certified = measured.errors.sum(-1).mean(1), measured.certificate.errors.sum(-1)
        axes.plot(range(len(mean)), mean.tolist(), label=f"{name}: measured, mean", **style)
        finite = [(layer, error) for layer, error in enumerate(certified.tolist()) if math.isfinite(error)]
        hollow = {**style, "linestyle": "none", "markerfacecolor": "none", "markersize": 8}
        axes.plot(*zip(*finite, strict=True), label=f"{name}: certified to layer {finite[-1][0]}", **hollow)
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    return figure


def plot_spectra(table: GeometryTable) -> Figure:
    """The singular values of each weight and of the operator, all blocks together, over the largest of each.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_modules.analysis.geometry import compare_geometry
        >>> A = torch.randn(2, 4, 8)
        >>> len(plot_spectra(compare_geometry({"W": A.sign()}, A)).axes[0].lines)
        2
    """
    figure, axes = _axes(f"Singular values: {table.title}", "index, all blocks", "singular value / the largest")
    for (name, row), style in zip(table.rows.items(), _styles(), strict=False):
        values = row.singular_values.flatten().sort(descending=True).values
        spacing = max(1, len(values) // 12)
        axes.plot((values / values[0]).tolist(), label=name, markevery=spacing, **style)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return figure


def plot_sign_history(history: SignHistory) -> Figure:
    """The fraction of signs that flipped in each epoch as hatched bars, by stage, and λ as a line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> figure = plot_sign_history(SignHistory((0, 1), (0.2, 0.0), (0.1, 0.11), ("signs", "scale")))
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['flipped in the epoch, %', 'λ']
    """
    figure, axes = _axes("Signs flipped in each epoch", "epoch", "flipped in the epoch, %")
    for stage, hatch in (("warm-up", ".."), ("signs", "//"), ("scale", "")):
        chosen = [index for index, name in enumerate(history.stages) if name == stage]
        if chosen:
            heights = [100 * history.flipped[index] for index in chosen]
            epochs = [history.epochs[index] for index in chosen]
            axes.bar(epochs, heights, hatch=hatch, color="0.85", edgecolor="0.2", label=f"flipped, stage: {stage}")
    second = axes.twinx()
    second.plot(history.epochs, history.scale, label="λ", **next(_styles()))
    second.set_ylabel("λ")
    (bars, names), (lines, more) = axes.get_legend_handles_labels(), second.get_legend_handles_labels()
    axes.set_ylim(0, max(0.1, 110 * max(history.flipped)))
    second.legend(bars + lines, names + more, fontsize="small")  # of the second axes: it is drawn last
    return figure


def plot_bounds(report: Generalization, name: str = "union") -> Figure:
    """One bound of the gap against N for each class, the gap that is the largest possible, and the measured one.

    Args:
        report: of `generalization_bounds`.
        name: of the bound, one of ``RISK_BOUNDS``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: another bound.

    Example:
        >>> from lightning_modules.analysis.generalization import ClassBounds
        >>> from lightning_modules.analysis.hypothesis_class import Box, UnrolledClass
        >>> network_class = UnrolledClass(1.0, 3, (0, 0), nonzeros=(10,), rows=(3,), structure_norms=(3.0,))
        >>> bounds = ClassBounds("one-bit", network_class, Box(1.0, 1.0, 1.0, 1.0), 1.0, 100, 0.1, 0.2, 0.05)
        >>> plot_bounds(Generalization({"one-bit": bounds}, 0.1, 100)).axes[0].get_xscale()
        'log'
    """
    if name not in RISK_BOUNDS:
        raise ValueError(f"{name!r} is no bound; expected one of {', '.join(RISK_BOUNDS)}")
    figure, axes = _axes(f"Bound of the train-test gap: {name}", "training examples N", "gap of the loss (in [0, 1])")
    first = report.classes["one-bit"]
    largest = max(count or 0 for count in (b.examples_for(name, report.target_gap) for b in report.classes.values()))
    stop = math.log10(max(10 * first.examples, 2 * largest))
    counts = [round(10 ** (1 + (stop - 1) * step / 40)) for step in range(41)]
    for (kind, bounds), style in zip(report.classes.items(), _styles(), strict=False):
        gaps = [bounds.gaps(count)[name] for count in counts]
        axes.plot(counts, gaps, label=kind, markevery=5, **style)
    axes.axhline(1 - first.train_loss, color="0.0", linewidth=0.8, label="vacuous above")
    axes.axvline(first.examples, color="0.5", linestyle=(0, (1, 3)), label=f"N = {first.examples:,}")
    measured = [(b.kind, abs(b.test_loss - b.train_loss)) for b in report.classes.values() if b.test_loss is not None]
    for (kind, gap), marker in zip(measured, _MARKERS, strict=False):
        axes.plot(first.examples, gap, marker, color="0.0", markerfacecolor="none", label=f"|measured|, {kind}")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize="small")
    return figure


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write a figure, in the format that the name ends in; a file is there whole or not at all.

    Example:
        >>> figure = plot_sign_history(SignHistory((0,), (0.2,), (0.1,), ("signs",)))
        >>> save_figure(figure, f"{tmp_path}/signs.png").name
        'signs.png'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix.removeprefix("."))
    return path
