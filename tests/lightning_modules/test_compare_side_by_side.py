"""Runs of a comparison side by side: the results of one after the other, wherever they train and whatever fails."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import psutil
import pytest
import yaml
from distributed import Client, LocalCluster
from joblib import parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.parallel import ThreadingBackend
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_modules.cli import main
from lightning_modules.compare.comparison import compare
from lightning_modules.compare.progress import RunProgress
from lightning_modules.compare.rows import Row
from lightning_modules.compare.runs import Run
from lightning_modules.compare.side_by_side import Caller, Outcome, outcomes
from pibinn_plugin.errors import TargetError

ROOT = Path(__file__).parents[2]
ROWS = [Row("global", "global"), Row("dense", "fp32_dense"), Row("ternary", "ternary_b158")]
CALL = [["--config", "small.yaml"], ROWS, range(2), [1e-3, 1e-2]]
RUNS = 2 * (2 + 1)  # two rows that apply, two rates and the other seed of the better one
FEW = [["--config", "small.yaml"], ROWS, [0], [1e-3]]  # of these
TIMES = ("train_seconds", "inference_microseconds")


def write_config(folder):
    """A config that trains in no time; fp32_dense does not apply to it."""
    config = yaml.safe_load((ROOT / "configs" / "sparse_recovery.yaml").read_text())
    operator = {
        "class_path": "lightning_modules.operators.SignBlocks",
        "init_args": {"blocks": 1, "rows": 8, "columns": 16},
    }
    config["model"]["solver"]["init_args"] = {"operator": operator, "layers": 1}
    config["data"]["init_args"] |= {
        "operator": operator, "train_examples": 64, "batch_size": 32, "evaluation_examples": 32
    }  # fmt: skip
    config["trainer"]["max_epochs"] = 2
    Path(folder, "small.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)


def with_one_job(call, folder):
    """What the files of a comparison hold that has one job."""
    write_config(folder)
    with chdir(folder):
        compare(*call, "one", lambda line: None)
        return contents("one")


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory):
    return with_one_job(CALL, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def few_one_after_the_other(tmp_path_factory):
    return with_one_job(FEW, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module", autouse=True)
def no_processes_left():
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


def contents(folder):
    """What the files of a comparison hold, but the times."""
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    results = {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}
    for result in results.values():
        for name in TIMES:
            result.pop(name, None)
    return files | results


def has_ended(process):
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition, seconds=30):
    start = time.monotonic()
    while not condition() and time.monotonic() - start < seconds:
        time.sleep(0.1)
    return condition()


@pytest.mark.slow
def test_two_at_a_time_give_the_results_of_one_after_the_other(one_after_the_other, capfd):
    lines = []
    comparison = compare(*CALL, "two", lines.append, jobs=2)
    assert len(one_after_the_other) == 2 * RUNS + 3  # a JSON file and a packed one of each run, three more of two bits
    assert contents("two") == one_after_the_other
    assert [line.row.name for line in comparison.lines] == ["global", "ternary"]
    assert comparison.left_out.keys() == {"dense"}
    assert sum(line.startswith("[row 2 of 3] dense is left out: the weights are dense") for line in lines) == 1
    assert len(lines) == RUNS + 1
    assert "Lightning" not in (said := "".join(capfd.readouterr())) and "GPU" not in said and "workers" not in said
    # Comparing again, in another folder of the same processes, trains what is not there and nothing else.
    lost = sorted(Path("two").glob("ternary*seed1*.json"))
    assert len(lost) == 1
    lost[0].unlink()
    again = []
    compare(*CALL, "two", again.append, jobs=2)
    assert sum(line.endswith("(kept)") for line in again) == RUNS - 1
    assert contents("two") == one_after_the_other


KILLED = """
import os, signal, psutil
from test_compare_side_by_side import CALL, compare
def report(line):
    print(*[each.pid for each in psutil.Process().children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
compare(*CALL, "out", report, jobs=2)
"""


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_process_behind_and_goes_on(one_after_the_other):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    processes = [int(word) for word in killed.stdout.split()]
    assert len(processes) >= 2
    assert all(wait_for(lambda each=each: has_ended(each)) for each in processes)
    kept = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.json")}
    assert 0 < len(kept) < RUNS
    compare(*CALL, "out", lambda line: None, jobs=2)
    assert contents("out") == one_after_the_other
    assert {name: Path("out", name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.slow
def test_what_a_worker_refuses_is_the_error_of_the_comparison(capsys):
    Path("rows.yaml").write_text("wrong: {quantizer: global, overrides: {qat.targets: {no_such: null}}}\n")
    options = ["--config", "small.yaml", "--rows", "rows.yaml", "--seeds", "1"]
    for jobs in ("1", "2"):
        with pytest.raises(SystemExit) as exit:
            main(["compare", *options, "--folder", "out", "--jobs", jobs])
        assert exit.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and "no_such" in errors[0], errors


@pytest.mark.slow
def test_a_killed_worker_is_one_error_and_what_is_finished_stays(one_after_the_other):
    def kill_workers(line):
        for worker in psutil.Process().children():
            if "popen_loky" in " ".join(worker.cmdline()):
                worker.kill()

    with pytest.raises(MisconfigurationException, match=r"terminated.*Finished runs are kept"):
        compare(*CALL, "out", kill_workers, jobs=2)
    lines = []
    compare(*CALL, "out", lines.append)
    assert any(line.endswith("(kept)") for line in lines)
    assert contents("out") == one_after_the_other


class AllAtOnce(ThreadingBackend):
    """As the backend of Ray: results are there when all are."""

    supports_return_generator = False


@pytest.mark.slow
@pytest.mark.parametrize("backend", [ThreadingBackend, AllAtOnce])
def test_runs_in_threads_take_turns(few_one_after_the_other, backend):
    with parallel_config(backend(), n_jobs=3):
        compare(*FEW, "threads", lambda line: None)
    assert contents("threads") == few_one_after_the_other


@pytest.mark.slow
def test_a_dask_cluster_gives_the_results_of_one_after_the_other(few_one_after_the_other):
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
        parallel_config("dask"),
    ):
        comparison = compare(*FEW, "dask", lambda line: None)
        assert contents("dask") == few_one_after_the_other
        assert comparison.left_out.keys() == {"dense"}
        with pytest.raises(TargetError, match="no_such"):
            compare(["--config", "small.yaml"], [Row("wrong", "global", {"qat.targets": {"no_such": None}})])


@pytest.mark.parametrize(
    ("folder", "words"), [("absent", "has no folder"), ("empty", "options of global-.* cannot be")]
)
def test_a_machine_without_the_files_is_said_to_be(folder, words):
    Path("empty").mkdir()
    run = Run(("--config", "small.yaml"), (), ROWS[0], 0, 1e-3)
    elsewhere = Caller(str(Path(folder).absolute()), 1, os.getpid())
    with pytest.raises(MisconfigurationException, match=words):
        list(outcomes([run], Path("out"), None, elsewhere))


def test_no_jobs_and_no_joblib_are_errors(monkeypatch):
    with pytest.raises(MisconfigurationException, match="jobs=0"):
        compare(*CALL, "out", jobs=0)
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ModuleNotFoundError, match=r"joblib: pip install pibinn-plugin\[lightning\]"):
        compare(*CALL, "out")


def test_what_is_wrong_with_a_row_shows_before_the_first_is_trained(capsys):
    rows = [ROWS[0], Row("wrong", "global", {"model.solver.init_args.no_such": 1})]
    with pytest.raises(SystemExit):
        compare(["--config", "small.yaml"], rows, [0], [1e-3], "out")
    assert "no_such" in capsys.readouterr().err
    assert not list(Path("out").iterdir())


def test_the_bar_counts_what_is_trained(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    monkeypatch.setenv("TERM", "xterm")
    result = {"val": {"NMSE": -1.0}, "train_seconds": 2.0}
    run = Run((), (), ROWS[0], 0, 1e-3)
    with RunProgress(ROWS, "NMSE", print) as progress:
        progress.expect(4)
        progress.show(Outcome(run, result))
        assert "1/4" in capsys.readouterr().out
        progress.show(Outcome(run, result, was_kept=True))
        assert "1/3" in (shown := capsys.readouterr().out)
        assert "[row 1 of 3] global, learning rate 0.001, seed 0: val NMSE -1 (kept)" in shown
        progress.expect(1)
        progress.show(Outcome(run, result))
        assert "2/2" in capsys.readouterr().out
