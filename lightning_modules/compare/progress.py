"""What a comparison says while it runs: a line for each run, and on a terminal one bar for all of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_modules.compare.rows import Row
from lightning_modules.compare.side_by_side import Outcome

__all__ = ["RunProgress"]


class RunProgress:
    """Reports outcomes of runs as they come.

    The bar counts what is trained, so that the time it expects is not that of results which were only read.

    Args:
        rows: of the comparison.
        metric: the name of that which is shown.
        report: gets each line.
    """

    def __init__(self, rows: Sequence[Row], metric: str, report: Callable[[str], None]) -> None:
        self._labels = {row.name: f"[row {number} of {len(rows)}] {row.name}" for number, row in enumerate(rows, 1)}
        self._metric, self._report = metric, report
        self._left_out: set[str] = set()
        console = Console()
        self._bar = Progress(
            TextColumn("compare"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # a thread that draws would disturb the times that are measured
            speed_estimate_period=math.inf,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compare", total=0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, count: int) -> None:
        """So many outcomes are still to come."""
        self._update(total=self._bar.tasks[self._task].completed + count)

    def show(self, outcome: Outcome) -> None:
        """Say what came out of a run; that a row is left out, once."""
        if outcome.result is not None:
            self._report(self._line(outcome))
        elif outcome.run.row.name not in self._left_out:
            self._left_out.add(outcome.run.row.name)
            self._report(f"{self._labels[outcome.run.row.name]} is left out: {outcome.reason}")
        if outcome.result is None or outcome.was_kept:
            self._update(total=(self._bar.tasks[self._task].total or 0) - 1)
        else:
            self._update(advance=1)

    def _update(self, total: float | None = None, advance: float | None = None) -> None:
        self._bar.update(self._task, total=total, advance=advance, refresh=True)

    def _line(self, outcome: Outcome) -> str:
        run, result = outcome.run, outcome.result or {}
        what = self._labels[run.row.name] + (f" from {run.start}" if run.start else "")
        value = "diverged" if "diverged" in result else f"val {self._metric} {_shown(result['val'][self._metric])}"
        how = "kept" if outcome.was_kept else f"{result['train_seconds']:.1f} s"
        return f"{what}, learning rate {run.learning_rate:g}, seed {run.seed}: {value} ({how})"


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
