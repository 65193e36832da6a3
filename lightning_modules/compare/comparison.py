"""`compare`: every row of a comparison, with one learning-rate search for all."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torchmetrics import MetricCollection

from lightning_modules.compare.callback import BaselineQAT
from lightning_modules.compare.progress import RunProgress
from lightning_modules.compare.rows import Row
from lightning_modules.compare.runs import Result, Run, build, callbacks_of
from lightning_modules.compare.side_by_side import Caller, Outcome, import_joblib, outcomes
from lightning_modules.quiet import quiet_lightning

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
    jobs: int | None = None,
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
        jobs: how many runs are trained at a time, as ``n_jobs`` of ``joblib.Parallel``: one unless given or set by
            ``joblib.parallel_config``, which also chooses where. The results are the same, bit for bit, on machines of
            one kind.

    Returns:
        What `lightning_modules.compare.table` and `lightning_modules.compare.plot` show.

    Raises:
        MisconfigurationException: no rows, seeds or learning rates, or one of them twice, no jobs, a config without
            metrics or without qat, or what the classes it names refuse.
        ModuleNotFoundError: joblib is not installed.
    """
    _check(rows, seeds, learning_rates, jobs)
    import_joblib()  # now, and not only where something is left to train
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts, row, caller = _config_texts(options), Row("global", "global"), Caller.here()
    first = Run(tuple(options), texts, row, seeds[0], learning_rates[0], seeded=tuple(seeded))
    with quiet_lightning():
        metric, test_metric = _criteria(first)
        search = {row.name: _candidates(replace(first, row=row), learning_rates) for row in rows}
        train = partial(outcomes, folder=Path(folder), jobs=jobs, caller=caller)
        with RunProgress(rows, metric.name, report) as progress:
            progress.expect(sum(map(len, search.values())) + len(rows) * (len(seeds) - 1))
            done = _by_name(train(itertools.chain(*search.values())), progress)
            best = {name: _best(runs, done, metric) for name, runs in search.items() if not _reason(runs, done)}
            final = {name: [replace(run, seed=seed) for seed in seeds] for name, run in best.items()}
            progress.expect(len(final) * (len(seeds) - 1))
            done |= _by_name(train(run for runs in final.values() for run in runs[1:]), progress)
    reasons = {row.name: _reason([*search[row.name], *final.get(row.name, ())], done) for row in rows}
    lines = (
        Line(row, _results(final[row.name], done), _results(search[row.name], done))
        for row in rows
        if not reasons[row.name]
    )
    return Comparison(metric, test_metric, tuple(lines), {name: why for name, why in reasons.items() if why})


def _check(rows: Sequence[Row], seeds: Sequence[int], learning_rates: Sequence[float], jobs: int | None) -> None:
    if not (rows and seeds and learning_rates):
        raise MisconfigurationException("a comparison has at least one row, one seed and one learning rate")
    for what, values in (("rows", [row.name for row in rows]), ("seeds", seeds), ("learning rates", learning_rates)):
        if twice := sorted({str(value) for value in values if list(values).count(value) > 1}):
            raise MisconfigurationException(f"the {what} {', '.join(twice)} are given more than once")
    if jobs == 0:
        raise MisconfigurationException("jobs=0: how many runs are trained at a time? -1 for one on each processor")


def _candidates(run: Run, learning_rates: Sequence[float]) -> list[Run]:
    """A run of the row for each start that it may choose, and for each learning rate."""
    rates = learning_rates if run.row.trains_weights else learning_rates[:1]
    return [replace(run, learning_rate=rate, start=start) for start in _starts(run) for rate in rates]


def _starts(run: Run) -> Sequence[str | None]:
    """What a row may start from. Every row is built: what is wrong with one shows before the first is trained."""
    with tempfile.TemporaryDirectory() as root:
        cli = build(run, root)
    if not run.row.chooses_start:
        return (None,)
    [baseline] = [callback for callback in callbacks_of(cli) if isinstance(callback, BaselineQAT)]
    return (None,) if baseline.initialization is None else baseline.initialization.solutions


def _by_name(coming: Generator[Outcome, None, None], progress: RunProgress) -> dict[str, Outcome]:
    """The outcomes by the names of their runs; each is shown when it comes."""
    done = {}
    with closing(coming):  # an error here ends what is being trained
        for outcome in coming:
            done[outcome.run.name] = outcome
            progress.show(outcome)
    return done


def _reason(runs: Iterable[Run], done: Mapping[str, Outcome]) -> str:
    """Why the row of these runs does not apply, as the first of them has it; nothing where it does."""
    tried = (done[run.name] for run in runs if run.name in done)
    return next((outcome.reason for outcome in tried if outcome.result is None), "")


def _results(runs: Iterable[Run], done: Mapping[str, Outcome]) -> tuple[Result, ...]:
    return tuple(result for run in runs if (result := done[run.name].result) is not None)


def _best(candidates: Sequence[Run], done: Mapping[str, Outcome], metric: Criterion) -> Run:
    scores = [_score(result, metric) for result in _results(candidates, done)]
    return candidates[scores.index(max(scores))]


def _criteria(run: Run) -> tuple[Criterion, Criterion]:
    with tempfile.TemporaryDirectory() as root:
        module = build(run, root).model
    return Criterion.first_of(module.val_metrics), Criterion.first_of(module.test_metrics)


def _score(result: Result, metric: Criterion) -> float:
    """Higher is better; a run that diverged is worst."""
    value = None if "diverged" in result else result["val"][metric.name]
    if value is None:
        return -float("inf")
    return value if metric.higher_is_better else -value


def _config_texts(options: Sequence[str]) -> tuple[str, ...]:
    """The text of every config that the options name."""
    paths = [value for key, value in itertools.pairwise(options) if key in ("--config", "-c")]
    paths += [option.partition("=")[2] for option in options if option.startswith("--config=")]
    if not paths:
        raise MisconfigurationException("which task? give --config, such as --config configs/sparse_recovery.yaml")
    return tuple(Path(path).read_text() for path in paths)
