"""The verb ``analyze`` on a small run: tables, plots, the float twin, and errors of one line."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from lightning_modules.analysis.sign_history import SignHistory
from lightning_modules.analyze import sign_logs
from lightning_modules.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "sparse_recovery.yaml"
PLOTS = ["bounds.png", "convergence.png", "signs.png", "spectra.png"]


def call(verb, *options):
    """Run one verb on the small config of the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning_modules", verb, "--config", "small.yaml", *options])
        main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small version of the committed config and its run: 40 training examples, again and again."""
    folder = tmp_path_factory.mktemp("trained")
    config = yaml.safe_load(CONFIG.read_text())
    operator = {
        "class_path": "lightning_modules.operators.SignBlocks",
        "init_args": {"blocks": 2, "rows": 8, "columns": 16},
    }
    config["model"]["solver"]["init_args"] = {"operator": operator, "layers": 3}
    config["data"]["init_args"] |= {
        "operator": operator, "train_examples": 128, "training_pairs": 40, "batch_size": 32, "evaluation_examples": 64
    }  # fmt: skip
    config["trainer"] |= {"max_epochs": 1, "default_root_dir": "run", "enable_progress_bar": False}
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call("fit")
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Run one verb in a copy of that folder."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return call


def error_of(run, capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]


def test_tables_and_plots(run, capsys):
    run("analyze")
    printed = capsys.readouterr().out
    assert "no float twin: run_float_twin/checkpoints/last.ckpt does not exist" in printed
    assert "float, trained" not in printed
    assert sorted(path.name for path in Path("run/analysis").iterdir()) == PLOTS
    for title in (
        "Generalization", "Convergence, side by side", "Convergence certificate: one-bit",
        "Convergence certificate: plain ISTA", "Spectral contraction", "Stability, layer by layer", "Sensitivity",
        "Geometry of the weights", "Signs during training",
    ):  # fmt: skip
        assert printed.count(f"== {title}") == 1
    for layer in range(3):
        assert f"solver.layers.{layer}.weight: one-bit global" in printed
    assert "N = 40" in printed  # each counts once
    assert "Held out: mean loss" in printed
    assert "log of the signs: run/lightning_logs/version_0/metrics.csv\n" in printed


def test_a_plan_needs_no_checkpoint(run, capsys):
    shutil.rmtree("run")
    run("analyze", "--plan", "0.2")
    printed = capsys.readouterr().out
    assert "N for a gap of 0.2" in printed
    for scheme in ("one-bit, 0% flips", "one-bit", "ternary", "channel-wise", "float"):
        assert any(line.strip().startswith(scheme) for line in printed.splitlines())
    assert "of 384 in a block" in printed  # 3 layers of 16 x 8
    assert "a gap of the loss lies between 0 and 1" in error_of(run, capsys, "analyze", "--plan", "2")


def test_the_float_twin_beside_the_run_is_compared(run, capsys):
    run("fit", "--float_twin", "true")
    capsys.readouterr()
    run("analyze")
    printed = capsys.readouterr().out
    assert "no float twin" not in printed
    assert "== Convergence certificate: float twin" in printed
    assert "solver.layers.2.weight: float, trained" in printed


def test_what_cannot_be_analyzed_is_one_line(run, capsys):
    assert "there is no checkpoint none.ckpt" in error_of(run, capsys, "analyze", "--ckpt_path", "none.ckpt")
    assert "float twin has no one-bit weights" in error_of(run, capsys, "analyze", "--float_twin", "true")
    deeper = ("--model.solver.init_args.layers", "4")
    assert "the checkpoint is that of another network" in error_of(run, capsys, "analyze", *deeper)


def test_other_solvers_get_what_holds_for_them(run, capsys):
    config = yaml.safe_load(Path("small.yaml").read_text())
    config["model"]["solver"] = {
        "class_path": "lightning_modules.solvers.hidden_lista.HiddenLISTA",
        "init_args": {"channels": 8, "layers": 2, "stride": 4, "frequencies": 4, "groups": 2},
    }
    config["qat"]["targets"] = {"solver.*_convolution*.weight": None}
    # As many unknowns as measurements: HiddenLISTA keeps the length of a signal.
    config["data"]["init_args"]["operator"]["init_args"] = {"blocks": 1, "rows": 16, "columns": 16}
    Path("small.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree("run")
    run("fit")
    capsys.readouterr()
    run("analyze")
    printed = capsys.readouterr().out
    assert "Not for this solver: HiddenLISTA has no operator, layers" in printed
    assert "Not of the operator's shape: " in printed
    for title in ("Generalization", "Sensitivity", "Signs during training"):
        assert printed.count(f"== {title}") == 1
    assert "Convergence certificate" not in printed


def test_a_calibration_gets_the_error_of_its_rows_and_the_curve_of_its_pairs(run, capsys):
    config = yaml.safe_load(Path("small.yaml").read_text())
    structure = {"class_path": "pibinn_plugin.BlockDiagonal", "init_args": {"blocks": 2}}
    config["model"]["solver"] = {
        "class_path": "lightning_modules.solvers.calibrated_amp.CalibratedAMP",
        "init_args": {"measurements": 16, "unknowns": 32, "structure": structure, "layers": 2},
    }
    config["qat"]["targets"] = {"solver.operator.weight": None}
    config["qat"]["initialization"] = {"class_path": "pibinn_plugin.initialization.SignsFromPairs"}
    Path("small.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree("run")
    run("fit")
    capsys.readouterr()
    run("analyze")
    printed = capsys.readouterr().out
    assert printed.count("== Error of the calibrated operator on new pairs") == 1
    assert printed.count("== How many pairs find the signs") == 1
    assert "solver.operator.weight: one-bit global" in printed
    assert Path("run/analysis/pairs.png").is_file()


def test_logs_with_signs_are_found_the_newest_first(tmp_path):
    assert sign_logs(tmp_path) == []
    for version, flipped in ((0, 0.1), (1, 0.2)):
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"epoch,qat/flipped,qat/scale,qat/stage\n0,{flipped},0.5,1.0\n")
    later = tmp_path / "lightning_logs" / "version_2"
    later.mkdir()
    (later / "metrics.csv").write_text("epoch,test/NMSE\n0,-9.0\n")
    for version, time in ((0, 2_000), (1, 1_000)):
        os.utime(tmp_path / "lightning_logs" / f"version_{version}" / "metrics.csv", (time, time))
    assert [(path.parent.name, history) for path, history in sign_logs(tmp_path)] == [
        ("version_0", SignHistory((0,), (0.1,), (0.5,), ("signs",))),
        ("version_1", SignHistory((0,), (0.2,), (0.5,), ("signs",))),
    ]


@pytest.mark.parametrize(("name", "options"), [("SparseSigns", {"nonzeros": 2}), ("SubsampledDCT", {})])
def test_operators_without_blocks_are_compared_as_a_matrix(run, capsys, name, options):
    size = {"rows": 8, "columns": 16}
    operator = {"class_path": f"lightning_modules.operators.{name}", "init_args": size | options}
    config = yaml.safe_load(Path("small.yaml").read_text())
    config["model"]["solver"] = {
        "class_path": "lightning_modules.solvers.learned_amp.LearnedAMP",
        "init_args": {"operator": operator, "layers": 3},
    }
    config["data"]["init_args"]["operator"] = operator
    Path("small.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree("run")
    run("fit")
    capsys.readouterr()
    run("analyze")
    printed = capsys.readouterr().out
    assert printed.count(": one-bit global") == 3
    assert "left out" not in printed
