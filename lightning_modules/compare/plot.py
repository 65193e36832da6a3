"""The plot of a comparison: error against stored bits."""

from __future__ import annotations

from pathlib import Path

from lightning_modules.analysis.plots import save_figure
from lightning_modules.compare.comparison import Comparison
from lightning_modules.compare.table import mean_and_deviation

__all__ = ["plot_error_against_bits"]

_MARKERS = "os^vD<>pPXh*d"


def plot_error_against_bits(comparison: Comparison, path: str | Path) -> Path:
    """Write a figure with a point for each row: the mean of the metric with its deviation, and the bits of its file.

    It reads in grey: rows differ by their markers, and global rows are filled with black.

    Args:
        comparison: what `lightning_modules.compare.comparison.compare` returned.
        path: of the figure; the ending says which format.

    Raises:
        ModuleNotFoundError: without matplotlib, which the extra ``plot`` brings.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, line in enumerate(comparison.lines):
        values = [result.get("test", {}).get(comparison.test_metric.name) for result in line.results]
        if None in values:
            continue
        mean, deviation = mean_and_deviation(values)
        axes.errorbar(
            8 * line.results[0]["file_bytes"],
            mean,
            yerr=deviation,
            fmt=_MARKERS[number % len(_MARKERS)],
            color="black" if line.row.quantizer == "global" else "0.35",
            markerfacecolor="black" if line.row.quantizer == "global" else "white",
            markersize=8,
            capsize=3,
            linestyle="none",
            label=line.row.name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("stored bits (packed file)")
    better = "higher" if comparison.test_metric.higher_is_better else "lower"
    axes.set_ylabel(f"test {comparison.test_metric.name}, {better} is better")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    if axes.containers:  # not every row has diverged
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return save_figure(figure, path)
