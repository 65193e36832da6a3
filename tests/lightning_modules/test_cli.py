"""The command line on a small problem: every verb, resuming, the float twin, and errors of one line."""

import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from full_disk import full_disk

import pibinn_plugin as pb
from lightning_modules.cli import main
from lightning_modules.modules import SolverModule
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA

CONFIG = Path(__file__).parents[2] / "configs" / "sparse_recovery.yaml"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run one verb on a small version of the committed config, inside ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(CONFIG.read_text())
    operator = {
        "class_path": "lightning_modules.operators.SignBlocks",
        "init_args": {"blocks": 2, "rows": 8, "columns": 16},
    }
    config["model"]["solver"]["init_args"] = {"operator": operator, "layers": 3}
    config["data"]["init_args"] |= {
        "operator": operator, "train_examples": 128, "batch_size": 32, "evaluation_examples": 64
    }  # fmt: skip
    config["trainer"] |= {"max_epochs": 4, "default_root_dir": "run", "enable_progress_bar": False}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))

    def call(verb, *options):
        monkeypatch.setattr(sys, "argv", ["lightning_modules", verb, "--config", "small.yaml", *options])
        main()

    return call


def cut_power_in_epoch_two(module):
    if module.current_epoch == 2:
        raise RuntimeError("power cut")


def small_solver():
    return CoupledISTA(SignBlocks(2, 8, 16), layers=3)


def nmse(printed):
    """The test error that the last table shows."""
    return float(re.findall(r"test/NMSE\s*[^\s\d-]*\s*(-?\d+\.\d+)", printed)[-1])


COMMANDS = ["analyze", "apply", "compare", "convert", "demo", "export", "fit", "frames", "summary", "test", "validate"]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", printed)] == []


def test_each_command_has_help(capsys):
    for name in ("apply", "compare", "demo", "frames"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert f" {name} " in capsys.readouterr().out.partition("\n")[0]


@pytest.mark.parametrize("name", ["aply", "predict", ""])
def test_another_command_is_refused_with_those_that_there_are(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([name, "--config", "small.yaml"])
    printed = capsys.readouterr()
    assert printed.err == f"error: there is no command {name!r}: expected one of {', '.join(COMMANDS)}\n"


def test_fit_test_convert_summary(run, capsys):
    run("fit")
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 3
    run("test")
    error = nmse(capsys.readouterr().out)
    run("convert")
    run("export", "--format", "onnx")
    session = onnxruntime.InferenceSession("run/solver.onnx")
    assert session.run(None, {session.get_inputs()[0].name: torch.zeros(3, 16).numpy()})[0].shape == (3, 32)
    run("summary")
    printed = capsys.readouterr().out
    size = Path("run/solver.safetensors").stat().st_size
    assert f"{size:,} bytes" in printed
    assert printed.count("layers.2.weight") == 2  # once by convert, once by summary
    assert f"onnx       {Path('run/solver.onnx').stat().st_size:>8,} " in printed
    packed = pb.load("run/solver.safetensors", into=small_solver())
    assert f"of which {size - pb.summary(packed).total_bytes:,} are its header)\n" in printed
    Path("run/solver.onnx").unlink()  # whose float twin would be exported again
    run("summary", "--model.solver.init_args.layers", "4")
    assert "bytes and not the total above: it is that of another network" in capsys.readouterr().out
    run("test", "--packed", "run/solver.safetensors")
    assert nmse(capsys.readouterr().out) == pytest.approx(error, abs=1e-3)
    loaded = pb.load("run/solver.safetensors", into=small_solver())
    scale = checkpoint["state_dict"]["pibinn_scale.value"].abs()
    assert torch.equal(loaded.layers[0].weight.abs(), scale.expand(2, 16, 8))


def test_a_packed_file_is_evaluated_exported_to_c_and_applied(run, capsys):
    run("fit", "--trainer.max_epochs", "1")
    run("convert")
    assert pb.load("run/solver.safetensors").layers[2].weight.shape == (2, 16, 8)
    y = torch.randn(3, 16)
    np.save("y.npy", y.numpy())
    main(["apply", "run/solver.safetensors", "y.npy", "-o", "x.npy"])
    with torch.no_grad():
        expected = pb.load("run/solver.safetensors", into=small_solver())(y)
    np.testing.assert_allclose(np.load("x.npy"), expected, rtol=1e-5, atol=1e-6)
    run("export", "--format", "c")
    assert re.search(r"c file: run/solver\.c .*\nflash [\d,]+ bytes, RAM [\d,]+ bytes on ", capsys.readouterr().out)
    for options, words in (
        (["--model.solver.init_args.operator.init_args.seed", "7"], "is not that of the file"),
        (["--ckpt_path", "run/checkpoints/last.ckpt"], "no checkpoint beside it"),
    ):
        with pytest.raises(SystemExit):
            run("test", "--packed", "run/solver.safetensors", *options)
        assert words in capsys.readouterr().err


def test_predict_is_no_verb(run, capsys):
    with pytest.raises(SystemExit):
        run("predict")
    assert "predict" in capsys.readouterr().err


def test_a_stopped_run_resumes_to_the_same_checkpoint(run):
    run("fit")
    whole = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(SolverModule, "on_train_epoch_start", cut_power_in_epoch_two)
        run("fit", "--trainer.default_root_dir", "other")
    assert torch.load("other/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    run("fit", "--trainer.default_root_dir", "other", "--ckpt_path", "last")
    cut = torch.load("other/checkpoints/last.ckpt", weights_only=True)
    assert cut["epoch"] == whole["epoch"] == 3
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name]), name


def test_the_float_twin_takes_one_override(run):
    run("fit", "--float_twin", "true")
    state = torch.load("run_float_twin/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {f"solver.{name}" for name in small_solver().state_dict()}
    assert not Path("run").exists()


def test_print_config_shows_the_targets(run, capsys):
    with pytest.raises(SystemExit) as exit:
        run("fit", "--print_config")
    assert exit.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["qat"]["targets"] == {"solver.layers.*.weight": None}


def test_a_structure_can_be_named(run):
    structure = '{"class_path": "pibinn_plugin.BlockDiagonal", "init_args": {"blocks": 2}}'
    run("fit", "--qat.targets", f'{{"solver.layers.*.weight": {structure}}}', "--trainer.max_epochs", "1")


def test_a_run_is_never_replaced(run, capsys):
    run("fit", "--trainer.max_epochs", "1")
    before = Path("run/checkpoints/last.ckpt").read_bytes()
    other = Path("other.ckpt")
    other.write_bytes(before)
    for options in ([], ["--ckpt_path", "other.ckpt"]):
        with pytest.raises(SystemExit) as exit:
            run("fit", *options)
        assert exit.value.code == 2
        assert "--ckpt_path last goes on with it" in capsys.readouterr().err
    run("fit", "--trainer.fast_dev_run", "true")  # writes nothing
    assert "checkpoint:" not in capsys.readouterr().out
    assert Path("run/checkpoints/last.ckpt").read_bytes() == before
    run("fit", "--ckpt_path", "last")
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("content", ["text", "truncated", "of another config", "not of training"])
def test_a_checkpoint_that_does_not_fit_is_one_line(run, capsys, content):
    run("fit", "--trainer.max_epochs", "1")
    path, options = Path("given.ckpt"), []
    checkpoint = Path("run/checkpoints/last.ckpt").read_bytes()
    if content == "text":
        path.write_text("epoch,loss\n" * 99)
    elif content == "not of training":
        torch.save({"weight": torch.ones(2)}, path)
    else:
        path.write_bytes(checkpoint[: len(checkpoint) // 2] if content == "truncated" else checkpoint)
    if content == "of another config":
        options = ["--model.solver.init_args.layers", "4"]
    capsys.readouterr()
    for verb in ("fit", "test", "validate", "convert"):
        folder = ["--trainer.default_root_dir", "elsewhere"]
        with pytest.raises(SystemExit) as exit:
            run(verb, "--ckpt_path", str(path), *options, *folder)
        assert exit.value.code == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert "another network than this one" in error if options else "no checkpoint of a training run" in error
        assert len(error) < 700
    assert Path("run/checkpoints/last.ckpt").read_bytes() == checkpoint


def test_a_full_disk_is_one_line_and_keeps_what_was_there(run, capsys):
    run("fit", "--trainer.max_epochs", "1")
    checkpoint = Path("run/checkpoints/last.ckpt").read_bytes()
    capsys.readouterr()
    formats = ["onnx", "pt2", "qonnx"]
    for verb, options, limit in [
        ("fit", ["--ckpt_path", "last"], 9000),
        ("convert", [], 300),
        *(("export", ["--format", format], 1000) for format in formats),
    ]:
        with full_disk(limit), pytest.raises(SystemExit) as exit:
            run(verb, *options)
        assert exit.value.code == 2, verb
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert "File too large" in error
    assert Path("run/checkpoints/last.ckpt").read_bytes() == checkpoint
    assert {path.name for path in Path("run").iterdir()} == {"checkpoints", "lightning_logs"}


def test_a_key_that_is_given_twice_is_one_line(run, capsys):
    config = Path("small.yaml").read_text()
    Path("small.yaml").write_text(config + "trainer: {max_epochs: 1}\n")
    with pytest.raises(SystemExit) as exit:
        run("fit")
    assert exit.value.code == 2
    assert "error: small.yaml: the key 'trainer' is given again in line" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_folder_that_is_a_file_is_one_line(run, capsys):
    with pytest.raises(SystemExit) as exit:
        run("fit", "--trainer.default_root_dir", "small.yaml")
    assert exit.value.code == 2
    assert "error: [Errno 20] Not a directory: '" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("fit", ["--trainer.max_epoch", "3"], "unrecognized arguments: --trainer.max_epoch"),
        ("test", [], "there is no checkpoint run/checkpoints/last.ckpt: run fit first"),
        ("convert", ["--float_twin", "true"], "float twin has no one-bit weights"),
        ("fit", ["--qat.targets", "{'solver.nothing.*': null}"], "matches no parameter"),
        ("fit", ["--model.solver.init_args.layers", "0"], "layers=0"),
        ("fit", ["--qat.scale_stage_start", "1.5"], "scale_stage_start"),
    ],
)
def test_an_error_is_one_line(run, capsys, verb, options, words):
    with pytest.raises(SystemExit) as exit:
        run(verb, *options)
    assert exit.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]
