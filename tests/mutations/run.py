"""Plant one fault after another in a copy of the project, and see whether the tests notice.

``python tests/mutations/run.py``, from the root of the project, with the Python of its environment; less than an
hour. Options name areas (``structure storage``, of `AREAS`), ``--jobs`` how many copies are tested at a time, and
``--only TEXT`` the faults whose file or text has it.

A fault is killed when one of its tests fails, or hangs for ten minutes. At first all tests are run without a fault:
they must pass. A fault that is alive is one that the tests do not notice: write a test, or say in the table why it is
harmless. The exit status is 0 when none is alive but harmless ones.
"""

import argparse
import contextlib
import functools
import importlib
import multiprocessing
import multiprocessing.pool
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from fault import Fault

ROOT = Path(__file__).parents[2]
AREAS = ("structure", "weights", "storage", "schemes", "workflow", "export", "kernel", "callback")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis", "build", "runs", "shared")
SECONDS = 600
# Compilers take most of the time, and see what eager tests see; a fault's own -k overrides this one.
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-k", "not compile"]
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # exit statuses of pytest; the last one where a module cannot be imported
# Imported once and not by every child; the plugin itself is not among them, since it is what differs.
PRELOADED = (
    "torch",
    "hypothesis",
    "numpy",
    "safetensors.torch",
    "pytorch_lightning",
    "torchao.quantization",
    "brevitas.nn",
)


class TableError(Exception):
    """A fault that cannot be planted, or tests that fail without one."""


def faults_of(areas: Iterable[str], text: str) -> list[Fault]:
    """The faults of some areas. Raises `TableError` where the original text is not there exactly once."""
    faults = [fault for area in areas for fault in importlib.import_module(f"faults_{area}").FAULTS]
    for fault in faults:
        count = (ROOT / fault.path).read_text().count(fault.original)
        if count != 1 or fault.original == fault.replaced:
            raise TableError(f"{fault.path} holds {count} times, not once: {fault.original!r}")
        if missing := [word for word in fault.arguments if "/" in word and not (ROOT / word.split("::")[0]).exists()]:
            raise TableError(f"there are no tests {missing} for {fault.original!r}")
    return [fault for fault in faults if text in f"{fault.path} {fault.original} {fault.replaced}"]


def copy_of_project(folder: Path) -> Path:
    """The files of the project, and the kernel as it is built."""
    copy = folder / "project"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    return copy


def exit_status(copy: Path, arguments: list[str]) -> int:
    """Of pytest in a copy, in this process, which must not have imported the plugin."""
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # for the processes that tests start
    sys.path.insert(0, str(copy))
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        return int(pytest.main([*OPTIONS, *arguments]))


def _plant_and_test(fault: Fault) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_project(Path(folder))
        path = copy / fault.path
        path.write_text(path.read_text().replace(fault.original, fault.replaced))
        if "csrc/" in fault.file:
            _build(copy)
        status = exit_status(copy, fault.arguments)
        os.chdir(ROOT)
    sys.exit(status)


def _build(copy: Path) -> None:
    for built in (copy / "pibinn_plugin/kernel").glob("*.so"):
        built.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)


def _in_child(function: functools.partial[None]) -> int | None:
    """The exit status of a child of this process, None where it hangs."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return None
    return child.exitcode


def _check_without_faults(faults: list[Fault]) -> None:
    arguments = sorted({word for fault in faults for word in fault.arguments if "/" in word})
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_project(Path(folder))
        command = [sys.executable, "-m", "pytest", *OPTIONS, *arguments]
        run = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(copy)}
        )
    if run.returncode != PASSED:
        raise TableError(f"without a fault the tests fail:\n{run.stdout[-3000:]}")


def verdict_of(fault: Fault) -> str:
    """``killed``, ``alive`` or ``harmless``. Raises `TableError` where the tests cannot be run."""
    status = _in_child(functools.partial(_plant_and_test, fault))
    if status in (FAILED, INTERRUPTED, None) or (status is not None and status < 0):  # below 0: ended by a signal
        return "killed"
    if status == PASSED:
        return "harmless" if fault.harmless else "alive"
    raise TableError(f"pytest ends with status {status} for {fault.arguments}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", default=AREAS, help=f"some of {', '.join(AREAS)}")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a fault first")
    options = parser.parse_args()
    try:
        faults = faults_of(options.areas, options.only)
        if not options.trust:
            _check_without_faults(faults)
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in PRELOADED:
        importlib.import_module(name)
    counts = dict.fromkeys(("killed", "alive", "harmless", "error"), 0)
    with multiprocessing.pool.ThreadPool(options.jobs) as pool:
        for fault, verdict, seconds in pool.imap_unordered(_timed_verdict, faults):
            counts[verdict.split(":")[0]] += 1
            print(f"{verdict:9}{seconds:4.0f} s  {fault.path}: {fault.original!r} -> {fault.replaced!r}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["alive"] or counts["error"] else 0


def _timed_verdict(fault: Fault) -> tuple[Fault, str, float]:
    start = time.monotonic()
    try:
        verdict = verdict_of(fault)
    except TableError as error:
        verdict = f"error: {error}"
    return fault, verdict, time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
