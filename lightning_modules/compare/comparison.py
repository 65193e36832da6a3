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
from torchmetrics import MetricCollection

from lightning_modules.compare.callback import BaselineQAT
from lightning_modules.compare.dense_twin import RowError
from lightning_modules.compare.rows import Row
from lightning_modules.compare.runs import Result, Run, build, callbacks_of, finished_run, train

__all__ = ["Comparison", "Criterion", "Line", "compare"]


@dataclass(frozen=True)
class Criterion:
    """The name of a metric, and which way is up."""

    name: str
    higher_is_better: bool

    @classmethod
    def first_of(cls, metrics: MetricCollection) -> Criterion:
        """The first metric of a collection.

        Raises:
            MisconfigurationException: there is none.
        """
        if not metrics:
            raise MisconfigurationException("the config has no model.metrics: what should be compared?")
        name, metric = next(iter(metrics.items(keep_base=True)))
        return cls(str(name), bool(metric.higher_is_better))


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
    """All lines, and the rows that do not apply with the reason of each.

    ``metric`` chose learning rates and starts on the validation set; ``test_metric`` is the first one of the test set.
    """

    metric: Criterion
    test_metric: Criterion
    lines: tuple[Line, ...]
    left_out: dict[str, str]


def compare(
    options: Sequence[str],
    rows: Sequence[Row],
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] = (2e-4, 2e-3, 1e-2),
    folder: str | Path = "runs/compare",
    report: Callable[[str], None] = print,
    seeded: Sequence[str] = (),
) -> Comparison:
    """Train each row at each learning rate, from each start, on the first seed, and at the best on every seed.

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
        metric, test_metric = _criteria(first)
        for number, row in enumerate(rows, 1):
            progress = f"[row {number} of {len(rows)}]"
            try:
                candidates = list(_candidates(replace(first, row=row), learning_rates))
                lines.append(_line(candidates, seeds, metric, partial(_result, Path(folder), metric, report, progress)))
            except RowError as error:
                left_out[row.name] = str(error)
                report(f"{progress} {row.name} is left out: {error}")
    return Comparison(metric, test_metric, tuple(lines), left_out)


def _candidates(run: Run, learning_rates: Sequence[float]) -> Iterator[Run]:
    """A run of the row for each start that it may choose, and for each learning rate."""
    rates = learning_rates if run.row.trains_weights else learning_rates[:1]
    for start in _starts(run) if run.row.chooses_start else (None,):
        yield from (replace(run, learning_rate=rate, start=start) for rate in rates)


def _starts(run: Run) -> Sequence[str | None]:
    with tempfile.TemporaryDirectory() as root:
        cli = build(run, root)
    [baseline] = [callback for callback in callbacks_of(cli) if isinstance(callback, BaselineQAT)]
    return (None,) if baseline.initialization is None else baseline.initialization.solutions


def _line(candidates: list[Run], seeds: Sequence[int], metric: Criterion, result_of: Callable[[Run], Result]) -> Line:
    """Search among the candidates, all of the first seed, and train the best on the other seeds."""
    search = [result_of(run) for run in candidates]
    scores = [_score(result, metric) for result in search]
    best = scores.index(max(scores))
    others = [result_of(replace(candidates[best], seed=seed)) for seed in seeds[1:]]
    return Line(candidates[best].row, (search[best], *others), tuple(search))


def _criteria(run: Run) -> tuple[Criterion, Criterion]:
    with tempfile.TemporaryDirectory() as root:
        module = build(run, root).model
    return Criterion.first_of(module.val_metrics), Criterion.first_of(module.test_metrics)


def _result(folder: Path, metric: Criterion, report: Callable[[str], None], progress: str, run: Run) -> Result:
    kept = finished_run(run, folder)
    result = kept or train(run, folder)
    start = f" from {run.start}" if run.start else ""
    value = "diverged" if "diverged" in result else f"val {metric.name} {_shown(result['val'][metric.name])}"
    how = "kept" if kept else f"{result['train_seconds']:.1f} s"
    report(f"{progress} {run.row.name}{start}, learning rate {run.learning_rate:g}, seed {run.seed}: {value} ({how})")
    return result


def _score(result: Result, metric: Criterion) -> float:
    """Higher is better; a run that diverged is worst."""
    value = None if "diverged" in result else result["val"][metric.name]
    if value is None:
        return -float("inf")
    return value if metric.higher_is_better else -value


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
