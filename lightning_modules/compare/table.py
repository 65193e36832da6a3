"""The table of a comparison, for the terminal and for a file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.compare.comparison import Comparison, Criterion, Line
from lightning_modules.compare.runs import Result
from lightning_modules.machine import machine
from pibinn_plugin.tables import text_table

__all__ = ["markdown", "mean_and_deviation", "results_text", "terminal_table"]

LEGEND = (
    "Mean ± standard deviation over seeds, of the network read back from its packed file. gap: how much worse {metric} "
    "is on the test set than on the training set, where it is measured on both. weight bits: codes, scales and "
    "structures of the weights; file bits: the whole packed file with float parameters and header. Ternary files hold "
    "five codes in a byte; in brackets with two bits a code. zero_bit: the weights that the constructor of the solver "
    "makes, of which nothing is stored; oracle: the operator that the others have to learn. train: seconds on the "
    "machine below; inference: µs of one example on one thread, the median; global runs on its packed signs, the "
    "others on weights unpacked to fp32. Times are taken where a run trains, beside others when several do at once."
)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the standard deviation of a sample; None for that of one value.

    Example:
        >>> mean_and_deviation([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def terminal_table(comparison: Comparison) -> str:
    """The table as text, and why rows are missing."""
    left_out = "".join(f"left out: {name}: {reason}\n" for name, reason in comparison.left_out.items())
    return text_table(_columns(comparison), _cells(comparison), left_columns=1) + left_out


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(markdown(["row", "bits"], [["global", "1"]]))
        | row | bits |
        |---|---|
        | global | 1 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else "|---" * len(line) + "|" for line in lines)


def results_text(comparison: Comparison, command: str, plot: Path) -> str:
    """The results as a Markdown file: table, plot, command, seeds, learning-rate search, machine."""
    seeds = [str(result["run"]["seed"]) for result in comparison.lines[0].results] if comparison.lines else []
    parts = [
        "# Comparison",
        f"`{command}`",
        markdown(_columns(comparison), _cells(comparison)),
        LEGEND.format(metric=comparison.metric.name),
        *(f"Left out: {name}: {reason}." for name, reason in comparison.left_out.items()),
        f"![{comparison.test_metric.name} against stored bits]({plot.name})",
        "## Learning rates",
        f"The same search for all rows: {comparison.metric.name} on the validation set, seed {''.join(seeds[:1])}; the "
        f"best was then trained on the seeds {', '.join(seeds)}. zero_bit and oracle train no weights.",
        markdown(["row", "start", "learning rate", f"validation {comparison.metric.name}"], _search_cells(comparison)),
        "## Machine",
        machine(),
    ]
    return "\n\n".join(parts) + "\n"


def _columns(comparison: Comparison) -> list[str]:
    metrics = [f"test {name}" for name in _metrics(comparison)]
    sizes = ["weight bits", "file bits"]
    return ["row", *metrics, "gap", "learning rate", *sizes, "train, s", "inference, µs"]


def _metrics(comparison: Comparison) -> list[str]:
    tests = [result["test"] for line in comparison.lines for result in line.results if "test" in result]
    return list(tests[0]) if tests else [comparison.test_metric.name]


def _cells(comparison: Comparison) -> list[list[str]]:
    return [_line_cells(line, comparison) for line in comparison.lines]


def _line_cells(line: Line, comparison: Comparison) -> list[str]:
    run, first = line.results[0]["run"], line.results[0]
    rate = f"{run['learning_rate']:g}" + (f", {run['start']}" if run["start"] else "")
    rate = rate if line.row.trains_weights else "-"
    metrics = _metrics(comparison)
    if line.has_diverged:
        diverged = sum("diverged" in result for result in line.results)
        return [line.row.name, f"{diverged} of {len(line.results)} diverged", *[""] * len(metrics), rate, *[""] * 4]
    figures = [_figure([result["test"][name] for result in line.results]) for name in metrics]
    gaps = [_difference(result, comparison.metric) for result in line.results]
    times = [[result[name] for result in line.results] for name in ("train_seconds", "inference_microseconds")]
    return [
        line.row.name,
        *figures,
        _figure(gaps) if comparison.metric.name in metrics else "-",
        rate,
        _size(first, "weight_bits", 1),
        _size(first, "file_bytes", 8),
        f"{statistics.fmean(times[0]):.1f}",
        f"{statistics.median(times[1]):.0f}",
    ]


def _figure(values: Sequence[float | None]) -> str:
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return "not finite"
    mean, deviation = mean_and_deviation(finite)
    return f"{mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _difference(result: Result, metric: Criterion) -> float | None:
    test, train = result["test"].get(metric.name), result["train"][metric.name]
    return None if test is None or train is None else (train - test if metric.higher_is_better else test - train)


def _size(result: Result, key: str, bits: int) -> str:
    two_bit = f" ({bits * result['two_bit'][key]:,})" if "two_bit" in result else ""
    return f"{bits * result[key]:,}{two_bit}"


def _search_cells(comparison: Comparison) -> list[list[str]]:
    tried = [(line.row.name, result) for line in comparison.lines for result in line.search]
    return [
        [name, result["run"]["start"] or "", f"{result['run']['learning_rate']:g}", _searched(result, comparison)]
        for name, result in tried
    ]


def _searched(result: Result, comparison: Comparison) -> str:
    return "diverged" if "diverged" in result else _figure([result["val"][comparison.metric.name]])
