"""Plots of the analyses, one function a result object; lines differ by style and marker, so that they read in grey.

matplotlib comes with ``pip install pibinn-plugin[plot]`` and is imported when a plot is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.analysis.comparison import ConvergenceComparison
from lightning_modules.analysis.generalization import FAILURE, CodeBounds
from lightning_modules.analysis.geometry import GeometryTable
from lightning_modules.analysis.kl_bound import code_bound
from lightning_modules.analysis.phase_transition import PairCurve, sign_accuracy
from lightning_modules.analysis.sign_history import SignHistory
from pibinn_plugin.storage.atomic_file import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_bounds", "plot_convergence", "plot_pairs", "plot_sign_history", "plot_spectra", "save_figure"]

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
    """The error of each layer where something is certified, otherwise the contraction that was measured.

    Error: measured mean as a line, certified error as hollow markers of the same shape. Contraction: the error after a
    layer over that before it, mean over the examples as a line, largest as hollow markers.

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
    certificates = [measured.certificate for measured in comparison.measurements.values()]
    if not any(bool(certificate.condition[0].all()) for certificate in certificates):
        return _plot_contraction(comparison)
    figure, axes = _axes("Error after each layer", "layer", "‖e‖₁, summed over the blocks")
    for (name, measured), style in zip(comparison.measurements.items(), _styles(), strict=False):
        mean, certified = measured.errors.sum(-1).mean(1), measured.certificate.errors.sum(-1)
        axes.plot(range(len(mean)), mean.tolist(), label=f"{name}: measured, mean", **style)
        finite = [(layer, error) for layer, error in enumerate(certified.tolist()) if math.isfinite(error)]
        axes.plot(*zip(*finite, strict=True), label=f"{name}: certified to layer {finite[-1][0]}", **_hollow(style))
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    return figure


def _plot_contraction(comparison: ConvergenceComparison) -> Figure:
    figure, axes = _axes("Measured contraction (nothing is certified)", "layer", "‖e‖₁ after the layer / before it")
    for (name, measured), style in zip(comparison.measurements.items(), _styles(), strict=False):
        contraction = measured.contraction
        layers = range(1, len(contraction) + 1)
        axes.plot(layers, contraction.mean(1).tolist(), label=f"{name}: mean", **style)
        axes.plot(layers, contraction.amax(1).tolist(), label=f"{name}: largest", **_hollow(style))
    axes.axhline(1.0, color="0.0", linewidth=0.8, label="no progress")
    axes.legend(fontsize="small")
    return figure


def _hollow(style: dict[str, Any]) -> dict[str, Any]:
    return {**style, "linestyle": "none", "markerfacecolor": "none", "markersize": 8}


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


def plot_bounds(report: CodeBounds) -> Figure:
    """The bound of the true mean loss against N for each scheme, at the loss that was measured, and that loss.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> bits, losses = torch.tensor(1000.0), (torch.tensor([0.1]),)
        >>> report = CodeBounds({"one-bit": bits}, {"one-bit": losses}, frozenset(["one-bit"]), (100,), "examples")
        >>> plot_bounds(report).axes[0].get_xscale()
        'log'
    """
    figure, axes = _axes("Bound of the true mean loss", "training examples N", "mean loss, at most")
    largest = max(report.counts[-1], *(float(bits.max()) for bits in report.bits.values()))
    stop = math.log10(100 * largest)
    counts = [round(10 ** (1 + (stop - 1) * step / 60)) for step in range(61)]
    for (scheme, bits), style in zip(report.bits.items(), _styles(), strict=False):
        bounds = [code_bound(report.losses[scheme][-1], bits, count, FAILURE) for count in counts]
        axes.plot(counts, bounds, label=scheme, markevery=6, **style)
    for count in report.counts:
        axes.axvline(count, color="0.5", linestyle=(0, (1, 3)), label=f"N = {count:,}")
    measured = float(report.losses["one-bit"][-1].mean())
    axes.axhline(measured, color="0.0", linewidth=0.8, label="train loss, one-bit")
    axes.set(xscale="log", ylim=(0, 1))
    axes.legend(fontsize="small")
    return figure


def plot_pairs(curve: PairCurve) -> Figure:
    """The fraction of right signs by the number of pairs: predicted as a line, measured as markers.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> plot_pairs(PairCurve((20, 30), 64, 0.01, (0.72, 0.84), (0.74, 0.87), (0.0, 0.0))).axes[0].get_xlabel()
        'pairs N'
    """
    figure, axes = _axes(f"Signs found from pairs, rows of {curve.unknowns}", "pairs N", "fraction of right signs")
    first, last = curve.pairs[0], curve.pairs[-1]
    grid = [first + (last - first) * step / 200 for step in range(201)]
    predicted = [sign_accuracy(pairs, curve.unknowns, curve.noise) for pairs in grid]
    styles = _styles()
    axes.plot(grid, predicted, label="box, predicted (arXiv 1510.01413)", **{**next(styles), "marker": ""})
    for label, values in (("box, measured", curve.box), ("SignsFromPairs, measured", curve.start)):
        axes.plot(curve.pairs, values, label=label, **_hollow(next(styles)))
    axes.axvline(curve.unknowns / 2, color="0.5", linestyle=(0, (1, 3)), label="N = n / 2")
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
