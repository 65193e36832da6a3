"""The command ``compare`` on a small problem: table, files, search, resuming, rows of one's own, errors of one line."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import yaml
from torchmetrics import MetricCollection

from lightning_modules.cli import main
from lightning_modules.compare.comparison import compare
from lightning_modules.compare.rows import Row, read_rows
from lightning_modules.compare.runs import Run, build, evaluate, inference_microseconds
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.metrics import NMSE, nmse_db
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a small version of the committed config, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "configs" / "sparse_recovery.yaml").read_text())
    operator = {
        "class_path": "lightning_modules.operators.SignBlocks",
        "init_args": {"blocks": 2, "rows": 8, "columns": 16},
    }
    config["model"]["solver"]["init_args"] = {"operator": operator, "layers": 2}
    config["data"]["init_args"] |= {
        "operator": operator, "train_examples": 96, "batch_size": 32, "evaluation_examples": 64
    }  # fmt: skip
    config["trainer"]["max_epochs"] = 2
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(*options):
    main(["compare", "--config", "small.yaml", "--folder", "out", *options])


def results():
    found = [json.loads(path.read_text()) for path in Path("out").glob("*.json")]
    return sorted(found, key=lambda result: (result["run"]["learning_rate"], result["run"]["seed"]))


def table_rows(text):
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row for row in cells[: cells.index(next(row for row in cells[1:] if row[0] == "row"))]}


def test_the_table_is_that_of_the_files(folder, capsys):
    run("--rows", "ternary_b158", "global", "--seeds", "2", "--learning_rates", "2e-4", "5e-2")
    printed = capsys.readouterr().out
    assert printed.count("learning rate 0.") == 6  # two rates on seed 0, the better one on seed 1, for two rows
    table = table_rows(Path("out/RESULTS.md").read_text())
    for row in ("ternary_b158", "global"):
        own = [result for result in results() if result["run"]["row"]["name"] == row]
        assert len(own) == 3
        searched = [result for result in own if result["run"]["seed"] == 0]
        best = min(searched, key=lambda result: result["val"]["NMSE"])["run"]["learning_rate"]
        final = [result for result in own if result["run"]["learning_rate"] == best]
        tests = [result["test"]["NMSE"] for result in final]
        gaps = [result["test"]["NMSE"] - result["train"]["NMSE"] for result in final]
        assert table[row][1:4] == [
            f"{fmean(tests):.3f} ± {stdev(tests):.3f}", f"{fmean(gaps):.3f} ± {stdev(gaps):.3f}", f"{best:g}"
        ]  # fmt: skip
        assert tests[0] != tests[1]
        for result in own:
            assert result["file_bytes"] == Path("out", result["file"]).stat().st_size
        assert table[row][5].split()[0] == f"{8 * final[0]['file_bytes']:,}"
        assert f"{8 * final[0]['file_bytes']:,}" in printed
    two_bit = next(Path("out").glob("ternary*.two_bit.safetensors")).stat().st_size
    assert f"({8 * two_bit:,})" in table["ternary_b158"][5]
    assert Path("out/error_against_bits.png").read_bytes().startswith(b"\x89PNG")
    run("--rows", "ternary_b158", "global", "--seeds", "2", "--learning_rates", "2e-4", "5e-2")
    assert capsys.readouterr().out.count("(kept)") == 6
    assert table_rows(Path("out/RESULTS.md").read_text()) == table


STOPPED = """
import os, signal
from lightning_modules.compare.comparison import compare
from lightning_modules.compare.rows import Row
reports = []
def report(line):
    reports.append(line)
    if len(reports) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
compare(["--config", "small.yaml"], [Row("fp32", "fp32")], range(3), [1e-3], "out", report)
"""


def test_a_killed_comparison_goes_on_where_it_was(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", STOPPED], env=environment, capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    kept = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.json")}
    assert len(kept) == 2
    reports = []
    comparison = compare(["--config", "small.yaml"], [Row("fp32", "fp32")], range(3), [1e-3], "out", reports.append)
    assert [line.endswith("(kept)") for line in reports] == [True, True, False]
    assert len(comparison.lines[0].results) == 3
    assert {name: Path("out", name).stat().st_mtime_ns for name in kept} == kept
    assert not list(Path("out").glob(".*"))


def test_other_settings_are_other_runs(folder):
    row, reports = [Row("zero_bit", "zero_bit")], []
    for options in (["--config", "small.yaml"], ["--config=small.yaml", "--trainer.max_epochs=1"]):
        compare(options, row, [0], [1e-3], "out", reports.append)
    Path("small.yaml").write_text(Path("small.yaml").read_text().replace("snr_db: 40.0", "snr_db: 10.0"))
    compare(["--config", "small.yaml"], row, [0], [1e-3], "out", reports.append)
    assert not any(line.endswith("(kept)") for line in reports)
    assert len({result["test"]["NMSE"] for result in results()}) == 3


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_more_options_get_the_seed(folder):
    run = Run(("--config", "small.yaml"), (), Row("global", "global"), 3, 1e-3, seeded=("data.operator.seed",))
    data, x = build(run, "out").datamodule, torch.randn(4, 32)
    assert torch.equal(data.operator.A(x), SignBlocks(2, 8, 16, seed=3).A(x))
    assert data.seed == 3
    assert replace(run, seeded=()).name != run.name


def test_rows_of_a_file_differ_by_their_overrides(folder, capsys):
    rows = {
        "zero_bit": None,
        "deeper": {
            "quantizer": "global",
            "overrides": {"model.solver.init_args.layers": 4, "qat.scale_stage_start": 1},
        },
    }
    Path("rows.yaml").write_text(yaml.safe_dump(rows))
    run("--rows", "rows.yaml", "--seeds", "1", "--learning_rates", "1e-3", "2e-3")
    table = table_rows(Path("out/RESULTS.md").read_text())
    zero_bit = next(result for result in results() if result["run"]["row"]["name"] == "zero_bit")
    assert len(results()) == 3  # it trains no weights, and needs no search
    assert zero_bit["weight_bits"] == 0
    assert table["deeper"][4] == f"{4 * 2 * 128 + 48 + 32:,}"  # the bits of four layers, one structure, one λ
    assert "±" not in table["deeper"][1]


def test_a_row_that_does_not_apply_is_left_out_with_its_reason(folder, capsys):
    one_block = ["--model.solver.init_args.operator.init_args.blocks=1", "--data.init_args.operator.init_args.blocks=1"]
    run("--rows", "fp32_dense", "zero_bit", "--seeds", "1", *one_block)
    assert "left out: fp32_dense: the weights are dense as they are" in capsys.readouterr().out
    text = Path("out/RESULTS.md").read_text()
    assert "Left out: fp32_dense: the weights are dense" in text
    assert set(table_rows(text)) == {"row", "---", "zero_bit"}


def test_baselines_search_their_start_where_one_bit_weights_start_from_pairs(folder):
    config = yaml.safe_load(Path("small.yaml").read_text())
    structure = {"class_path": "pibinn_plugin.BlockDiagonal", "init_args": {"blocks": 2}}
    config["model"]["solver"] = {
        "class_path": "lightning_modules.solvers.calibrated_amp.CalibratedAMP",
        "init_args": {"measurements": 16, "unknowns": 32, "structure": structure, "layers": 2},
    }
    config["qat"] |= {
        "targets": {"solver.operator.weight": None},
        "initialization": {"class_path": "pibinn_plugin.initialization.SignsFromPairs"},
    }
    Path("small.yaml").write_text(yaml.safe_dump(config))
    rows = [Row("global", "global"), Row("b1.58", "ternary_b158"), Row("dense", "fp32_dense")]
    dense = {"model.solver.init_args.structure": {"class_path": "pibinn_plugin.Dense"}}
    rows += [Row("built dense", "fp32", dense), Row("oracle", "oracle")]
    comparison = compare(["--config", "small.yaml"], rows, [0], [1e-3], "out", lambda line: None)
    ours, ternary, built_dense, oracle = comparison.lines
    assert [result["run"]["start"] for result in (*ours.search, *oracle.search)] == [None, None]
    assert [result["run"]["start"] for result in ternary.search] == ["ridge", "box", "one_bit", "signs"]
    best = min(ternary.search, key=lambda result: result["val"]["NMSE"])
    assert ternary.results == (best,)
    assert built_dense.results[0]["weight_bits"] == 32 * 16 * 32 + 8
    assert "uses its weights in the structure" in comparison.left_out["dense"]


def test_a_run_that_diverges_is_said_to(folder, capsys):
    run("--rows", "ternary_twn", "--seeds", "1", "--learning_rates", "1e30", "--model.scalar_learning_rate=1e30")
    assert "diverged" in capsys.readouterr().out
    row = table_rows(Path("out/RESULTS.md").read_text())["ternary_twn"]
    assert "diverged" in row[1] or row[1] == "not finite"


def test_parq_applies_to_the_solvers_of_the_command_line(folder):
    run("--rows", "parq", "--seeds", "1", "--learning_rates", "1e-3")
    text = Path("out/RESULTS.md").read_text()
    assert "parq" in table_rows(text)
    assert "left out" not in text


@pytest.mark.parametrize("names", [["fp32", "global"], []])
def test_rows_by_name(names):
    rows = read_rows(names)
    assert [row.name for row in rows] == [row.quantizer for row in rows]
    assert {"fp32", "global"} <= {row.name for row in rows}
    assert len(rows) == (len(names) or 12)


def test_the_committed_rows_can_be_read():
    for path in (ROOT / "configs" / "rows").glob("*.yaml"):
        rows = read_rows([str(path)])
        assert any(row.quantizer in ("global", "zero_bit") for row in rows), path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rows", "binary"], "unknown quantizer 'binary'"),
        (["--rows", "absent.yaml"], "absent.yaml"),
        (["--rows", "list.yaml"], "should map each row"),
        (["--rows", "word.yaml"], "should map each row"),
        (["--seeds", "0"], "seeds=0"),
        (["--learning_rates", "-1"], "rates positive"),
        (["--float_twin", "true"], "no targets to compare"),
        (["--model.solver.init_args.layers", "0"], "layers=0"),
        (["--model.metrics", "[]"], "no model.metrics"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_an_error_is_one_line(folder, capsys, options, words):
    Path("list.yaml").write_text("- global\n")
    Path("word.yaml").write_text("global: {quantiser: fp32}\n")
    with pytest.raises(SystemExit) as exit:
        run(*options)
    assert exit.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]


def test_a_comparison_needs_a_config(folder, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--rows", "global"])
    assert "which task? give --config" in capsys.readouterr().err


def test_evaluation_is_that_of_the_whole_set():
    operator = SignBlocks(2, 8, 16)
    solver, data = CoupledISTA(operator, layers=2), SparseRecovery(operator, batch_size=5, evaluation_examples=33)
    data.setup()
    metrics = MetricCollection([NMSE()], prefix="test/")
    found = evaluate(solver, data.test_dataloader(), metrics)
    y, x = data.test_set.tensors
    assert found == {"NMSE": pytest.approx(nmse_db(solver(y), x).item(), abs=1e-5)}
    assert inference_microseconds(solver, y[:1]) > 0
    with torch.no_grad():
        solver.thresholds.fill_(float("nan"))
    assert evaluate(solver, data.test_dataloader(), metrics) == {"NMSE": None}
