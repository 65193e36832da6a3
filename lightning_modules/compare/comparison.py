"""`compare`: every row of a comparison, with one learning-rate search for all."""

from __future__ import annotations

import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pytorch_lightning.utilities.exceptions import MisconfigurationException

import pibinn_plugin as pb
from lightning_modules.compare.dense_twin import RowError
from lightning_modules.compare.rows import Row
from lightning_modules.compare.runs import Result, Run, build, callbacks_of, finished_run, train
from pibinn_plugin.initialization import SignsFromPairs

__all__ = ["Comparison", "Line", "compare"]


@dataclass(frozen=True)
class Line:
    """One line of the table: a row at its best learning rate, a result for each seed, and how that rate was found."""

    row: Row
    results: tuple[Result, ...]
    search: tuple[Result, ...]

    @property
    def has_diverged(self) -> bool:
        """Whether there is a seed without a result."""
        return any("diverged" in result for result in self.results)


@dataclass(frozen=True)
class Comparison:
    """All lines, the metric that chose the learning rates, and the rows that do not apply with the reason of each."""

    metric: str
    higher_is_better: bool
    lines: tuple[Line, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class _Task:
    metric: str
    higher_is_better: bool
    starts_from_pairs: bool


def compare(
    options: Sequence[str],
    rows: Sequence[Row],
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] = (2e-4, 2e-3, 1e-2),
    folder: str | Path = "runs/compare",
    report: Callable[[str], None] = print,
    seeded: Sequence[str] = (),
) -> Comparison:
    """Train each row at each learning rate on the first seed, and at the best of them on every seed.

    The best is that of the config's first metric on the validation set. Runs that were finished before, in the same
    folder and with the same settings, are read and not trained again; the code and the data files are not looked at.

    Args:
        options: of the command line as for ``fit``, such as ``["--config", "configs/sparse_recovery.yaml"]``.
        rows: see `lightning_modules.compare.rows`.
        seeds: of weights and training data.
        learning_rates: of weights and latents; the same for all rows.
        folder: of results and packed files.
        report: gets a line for each run.
        seeded: more options of the command line that get each seed, such as ``data.operator.seed`` where the operator
            is unknown to the solver and should be another one for each seed.

    Returns:
        What `lightning_modules.compare.table` and `lightning_modules.compare.plot` show.

    Raises:
        MisconfigurationException: no rows, seeds or learning rates, or one of them twice, a config without metrics
            or without qat, or what the classes it names refuse.
    """
    if not (rows and seeds and learning_rates):
        raise MisconfigurationException("a comparison has at least one row, one seed and one learning rate")
    for what, values in (("rows", [row.name for row in rows]), ("seeds", seeds), ("learning rates", learning_rates)):
        if twice := sorted({str(value) for value in values if list(values).count(value) > 1}):
            raise MisconfigurationException(f"the {what} {', '.join(twice)} are given more than once")
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts, row = _config_texts(options), Row("global", "global")
    first = Run(tuple(options), texts, row, seeds[0], learning_rates[0], seeded=tuple(seeded))
    lines, left_out = [], {}
    with _quiet_lightning():
        task = _task(first)
        for number, row in enumerate(rows, 1):
            starts = (task.starts_from_pairs and row.starts) or (None,)
            rates = learning_rates if row.trains_weights else learning_rates[:1]
            candidates = [
                replace(first, row=row, learning_rate=rate, start=start) for start in starts for rate in rates
            ]
            progress = f"[row {number} of {len(rows)}]"
            try:
                lines.append(_line(candidates, seeds, task, partial(_result, Path(folder), task, report, progress)))
            except RowError as error:
                left_out[row.name] = str(error)
                report(f"{progress} {row.name} is left out: {error}")
    return Comparison(task.metric, task.higher_is_better, tuple(lines), left_out)


def _line(candidates: list[Run], seeds: Sequence[int], task: _Task, result_of: Callable[[Run], Result]) -> Line:
    """Search among the candidates, all of the first seed, and train the best on the other seeds."""
    search = [result_of(run) for run in candidates]
    scores = [_score(result, task) for result in search]
    best = scores.index(max(scores))
    others = [result_of(replace(candidates[best], seed=seed)) for seed in seeds[1:]]
    return Line(candidates[best].row, (search[best], *others), tuple(search))


def _task(run: Run) -> _Task:
    with tempfile.TemporaryDirectory() as root:
        cli = build(run, root)
    metrics = dict(cli.model.test_metrics.items(keep_base=True))
    if not metrics:
        raise MisconfigurationException("the config has no model.metrics: what should be compared?")
    qat = next(callback for callback in callbacks_of(cli) if isinstance(callback, pb.TwoStageQAT))
    name, metric = next(iter(metrics.items()))
    return _Task(name, bool(metric.higher_is_better), isinstance(qat.initialization, SignsFromPairs))


def _result(folder: Path, task: _Task, report: Callable[[str], None], progress: str, run: Run) -> Result:
    kept = finished_run(run, folder)
    result = kept or train(run, folder)
    start = f" from {run.start}" if run.start else ""
    value = "diverged" if "diverged" in result else f"val {task.metric} {_shown(result['val'][task.metric])}"
    how = "kept" if kept else f"{result['train_seconds']:.1f} s"
    report(f"{progress} {run.row.name}{start}, learning rate {run.learning_rate:g}, seed {run.seed}: {value} ({how})")
    return result


def _score(result: Result, task: _Task) -> float:
    """Higher is better; a run that diverged is worst."""
    value = None if "diverged" in result else result["val"][task.metric]
    if value is None:
        return -float("inf")
    return value if task.higher_is_better else -value


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _config_texts(options: Sequence[str]) -> tuple[str, ...]:
    """The text of every config that the options name."""
    paths = [value for key, value in itertools.pairwise(options) if key in ("--config", "-c")]
    paths += [option.partition("=")[2] for option in options if option.startswith("--config=")]
    if not paths:
        raise MisconfigurationException("which task? give --config, such as --config configs/sparse_recovery.yaml")
    return tuple(Path(path).read_text() for path in paths)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without what Lightning says once a run: a comparison has a line a run of its own."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
