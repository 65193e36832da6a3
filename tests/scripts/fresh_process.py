"""Python in a process of its own that has imported torch and nothing else: the fork of one that did so once.

A new interpreter for each would spend most of its time on that import.
"""

import multiprocessing
import os
import subprocess
import tempfile
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "typing_extensions"])


def run_code(code: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run it, with these variables of the environment besides; what it printed, as ``subprocess.run`` gives it."""
    with tempfile.TemporaryDirectory() as folder:
        process = _context.Process(target=_run, args=(code, folder, environment))
        process.start()
        process.join()
        printed = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    result = subprocess.CompletedProcess(code, process.exitcode, *printed)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def _run(code: str, folder: str, environment: dict[str, str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    exec(code, {"__name__": "__main__"})
