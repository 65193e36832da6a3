"""The runs of a comparison side by side, in the processes or on the cluster that joblib is told to use.

What comes out of a run depends on the run alone: not on the process, nor on what that process has trained before.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from contextlib import chdir
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_modules.compare.dense_twin import RowError
from lightning_modules.compare.runs import Result, Run, finished_run, train
from lightning_modules.quiet import quiet_lightning

__all__ = ["Caller", "Outcome", "import_joblib", "outcomes"]

# A run seeds the random numbers of its whole process: where a backend has threads, they take turns.
_TURN = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """What came out of a run: a result, or the reason why its row does not apply.

    Args:
        run: what was trained.
        result: None where the row does not apply.
        reason: why it does not.
        was_kept: whether the run was finished before.
    """

    run: Run
    result: Result | None = None
    reason: str = ""
    was_kept: bool = False


@dataclass(frozen=True)
class Caller:
    """The process that compares: what a run takes from there, wherever it is trained.

    Args:
        directory: to which paths are relative.
        threads: of torch, unless the options of a run say how many.
        process: its number.
    """

    directory: str
    threads: int
    process: int

    @classmethod
    def here(cls) -> Caller:
        """This process, as it is now."""
        return cls(os.getcwd(), torch.get_num_threads(), os.getpid())


def import_joblib() -> ModuleType:
    """Joblib, which only comparisons need.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import joblib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("compare needs joblib: pip install pibinn-plugin[lightning]") from error
    return joblib


def outcomes(runs: Iterable[Run], folder: Path, jobs: int | None, caller: Caller) -> Generator[Outcome, None, None]:
    """Train what was not finished before, and give the outcomes as they come; equal runs have one.

    Once one run of a row says that the row does not apply, those of its runs that have not begun are left out.

    Args:
        runs: to train.
        folder: of results.
        jobs: how many at a time, as ``n_jobs`` of ``joblib.Parallel``.
        caller: see `Caller`.

    Raises:
        MisconfigurationException: a process was killed, or what else a run raises.
    """
    missing, left_out = [], set[str]()
    for run in {run.name: run for run in runs}.values():
        if (result := finished_run(run, folder)) is None:
            missing.append(run)
        else:
            yield Outcome(run, result, was_kept=True)
    if not missing:
        return
    delayed = import_joblib().delayed
    # Read by joblib when a process is free, so that it sees what was left out in the meantime.
    work = (delayed(_train)(run, folder, caller) for run in missing if run.row.name not in left_out)
    try:
        for outcome in _parallel(jobs)(work):
            if outcome.result is None:
                left_out.add(outcome.run.row.name)
            yield outcome
    except BrokenProcessPool as error:
        reason = str(error).partition("\n")[0]
        raise MisconfigurationException(
            f"{reason} Finished runs are kept, and the same comparison goes on from there; fewer jobs need less memory"
        ) from error


def _parallel(jobs: int | None) -> Callable[[Iterable[Any]], Iterable[Outcome]]:
    parallel = partial(import_joblib().Parallel, n_jobs=jobs, batch_size=1)
    try:
        return parallel(return_as="generator_unordered")
    except ValueError:  # the backend of Ray gives results only when all are there
        return parallel()


def _train(run: Run, folder: Path, caller: Caller) -> Outcome:
    """Train a run wherever joblib has brought it."""
    _end_with(caller.process)
    with _TURN, _directory(caller.directory), quiet_lightning():
        torch.set_num_threads(caller.threads)
        try:
            return Outcome(run, train(run, folder))
        except RowError as error:
            return Outcome(run, reason=str(error))
        except SystemExit as error:
            if error.code != 2:  # 1: Lightning ends the process that it was interrupted in
                raise
            # The caller has parsed these options; a worker of Dask would not survive that this one cannot.
            raise MisconfigurationException(
                f"the options of {run.name} cannot be read on {platform.node()}; what is wrong is in the output of "
                f"its worker. Files and packages of the comparison have to be there too"
            ) from error


def _directory(path: str) -> chdir[str]:
    if not Path(path).is_dir():
        raise MisconfigurationException(
            f"{platform.node()} has no folder {path}: every machine of a cluster needs that of the comparison, by the "
            f"same path"
        )
    return chdir(path)


@cache
def _end_with(caller: int) -> None:
    """See that a child of the caller ends with it: joblib's own would train on after the caller was killed."""
    if os.getppid() == caller:
        threading.Thread(target=_wait_for_the_end_of, args=(caller,), daemon=True).start()


def _wait_for_the_end_of(caller: int) -> None:
    while os.getppid() == caller:
        time.sleep(1)
    os._exit(1)
