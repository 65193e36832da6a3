"""The committed imaging configs through the command line, in small and on generated images."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import pibinn_plugin as pb
from lightning_modules.block_patterns import BlockPatterns, LearnedBlockPatterns
from lightning_modules.cli import main
from lightning_modules.compare.rows import read_rows
from lightning_modules.compare.runs import Run, build
from lightning_modules.data.bsds500 import BSD68
from lightning_modules.modules import SolverModule
from lightning_modules.solvers.support_lista import SupportLISTA
from lightning_modules.walsh_patterns import WalshPatterns

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Smooth images with an edge in the three folders of the data set."""
    root = tmp_path_factory.mktemp("images")
    names = [("train", "1"), ("test", "2"), ("val", "8023"), *(("val", name) for name in sorted(BSD68))]
    random = np.random.default_rng(0)
    for part, name in names:
        (root / part).mkdir(exist_ok=True)
        steps = random.standard_normal((33, 25)).cumsum(0).cumsum(1)
        steps[:, random.integers(5, 20) :] += 20
        grey = 255 * (steps - steps.min()) / np.ptp(steps)
        Image.fromarray(np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)).save(root / part / f"{name}.jpg")
    return root


def patterns(kind, **arguments):
    init_args = {"block_size": 8, "measurements": 16, **arguments}
    return {"class_path": f"lightning_modules.block_patterns.{kind}", "init_args": init_args}


@pytest.fixture
def run(tmp_path, monkeypatch, images):
    """Run a verb on a small version of a committed config, inside ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def call(name, verb, *options):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        solver, data = config["model"]["solver"]["init_args"], config["data"]["init_args"]
        if is_camera := "decoder" in solver:
            solver = solver["decoder"]["init_args"]
            data |= {"block_size": 8, "measurements": 16}
            solver["operator"]["init_args"]["start"]["init_args"] |= {"block_size": 8, "measurements": 16}
        solver |= {"stages": 2, "channels": min(solver["channels"], 4)}
        if "operator" in solver and not is_camera:
            learned = solver["operator"]["class_path"].endswith("LearnedBlockPatterns")
            solver["operator"] = patterns("LearnedBlockPatterns") if learned else patterns("BlockPatterns", seed=0)
            data["operator"] = patterns("BlockPatterns", seed=0)
            if learned:
                config["qat"]["initialization"]["init_args"] = {"block_size": 8}
        data |= {"data_dir": str(images), "patch_size": 24, "batch_size": 4, "train_patches": 32}
        config["trainer"] |= {"max_epochs": 2, "default_root_dir": "run", "enable_progress_bar": False}
        Path("small.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["lightning_modules", verb, "--config", "small.yaml", *options])
        main()

    return call


def last_checkpoint(folder="run"):
    return torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("bsds_denoising", None),
        ("single_pixel", BlockPatterns(8, 16)),
        ("single_pixel_uncalibrated", LearnedBlockPatterns(8, 16)),
    ],
)
def test_fit_test_convert(run, capsys, name, operator):
    run(name, "fit")
    run(name, "test")
    printed = capsys.readouterr().out
    assert "test/PeakSignalNoiseRatio" in printed and "test/StructuralSimilarityIndexMeasure" in printed
    assert Path("run/images.png").stat().st_size > 1000
    run(name, "convert")
    config = yaml.safe_load(Path("small.yaml").read_text())["model"]["solver"]["init_args"]
    solver = SupportLISTA(**{**config, "operator": operator} if operator else config)
    packed = pb.load("run/solver.safetensors", into=solver)
    scale = last_checkpoint()["state_dict"]["pibinn_scale.value"].abs()
    assert pb.global_scale(packed)().item() == pytest.approx(scale.item())
    y = torch.rand(1, 1, 24, 24) if operator is None else torch.rand(1, 16, 3, 3)
    assert packed(y).shape == (1, 1, 24, 24)


def test_uncalibrated_patterns_start_at_the_signs_of_the_device(run):
    run("single_pixel_uncalibrated", "fit", "--data.init_args.calibration_patches", "32",
        "--data.init_args.noise_level", "0.01", "--model.learning_rate", "0.0")  # fmt: skip
    latents = last_checkpoint()["state_dict"]["solver.operator.parametrizations.weight.original"]
    agreement = (latents.sign() == BlockPatterns(8, 16).patterns.sign()).float().mean()
    assert agreement > 0.95


def cut_power_in_epoch_one(module):
    if module.current_epoch == 1:
        raise RuntimeError("power cut")


def test_learned_patterns_from_fit_to_frames(run, capsys):
    run("learned_patterns", "fit")
    run("learned_patterns", "test")
    error = re.search(r"test/PeakSignalNoiseRatio +│ +([\d.]+)", capsys.readouterr().out)[1]
    assert Path("run/patterns.png").stat().st_size > 1000
    run("learned_patterns", "convert")
    run("learned_patterns", "test", "--packed", "run/solver.safetensors")
    again = re.search(r"test/PeakSignalNoiseRatio +│ +([\d.]+)", capsys.readouterr().out)[1]
    assert float(again) == pytest.approx(float(error), abs=1e-3)
    camera, x = pb.load("run/solver.safetensors"), torch.rand(1, 1, 24, 32)
    main(["frames", "run/solver.safetensors", "-o", "frames"])
    frames = [np.asarray(Image.open(f"frames/pattern_{number:03}.png")) for number in range(16)]
    signs = torch.from_numpy(2.0 * np.stack(frames) - 1).float().unsqueeze(1)
    y = torch.nn.functional.conv2d(x, signs, stride=8) / 8  # what the two detectors see
    np.save("y.npy", y.numpy())
    main(["apply", "run/solver.safetensors", "y.npy", "-o", "x.npy"])
    with torch.no_grad():
        scene = torch.cat([torch.nn.functional.pixel_unshuffle(x, 8), torch.zeros(1, 16, 3, 4)], 1)
        np.testing.assert_allclose(np.load("x.npy"), camera(scene)[:, 0].clamp(0, 1), atol=1e-4)


def test_a_stopped_camera_resumes_to_the_same_checkpoint(run):
    run("learned_patterns", "fit")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(SolverModule, "on_train_epoch_start", cut_power_in_epoch_one)
        run("learned_patterns", "fit", "--trainer.default_root_dir", "other")
    run("learned_patterns", "fit", "--trainer.default_root_dir", "other", "--ckpt_path", "last")
    whole, resumed = (last_checkpoint(folder)["state_dict"] for folder in ("run", "other"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole if "_extra_state" not in key)


EXPOSURES = {"global": 1, "zero_bit": 1, "ternary_b158": 2, "fp32": 8}  # of a pattern, by its quantizer


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(
    ("file", "measurements", "count"), [("learned_patterns", 64, 8), ("learned_patterns_26", 26, 5)]
)
def test_rows_of_learned_patterns_have_equal_patterns_or_exposures(monkeypatch, tmp_path, file, measurements, count):
    monkeypatch.chdir(CONFIGS.parent)
    start = "model.solver.init_args.decoder.init_args.operator.init_args.start.init_args.measurements"
    options = (
        "--config=configs/learned_patterns.yaml",
        f"--data.init_args.measurements={measurements}",
        f"--{start}={measurements}",
    )
    rows = read_rows([f"configs/rows/{file}.yaml"])
    assert [row.quantizer for row in rows[:2]] == ["global", "zero_bit"] and len(rows) == count
    for row in rows:
        cli = build(Run(options, (), row, 0, 1e-3), str(tmp_path))
        patterns = cli.model.solver.patterns
        assert cli.datamodule.example_patterns.shape == patterns.shape
        assert patterns.correlation == "isotropic"
        equal_exposures = "equal exposures" in row.name
        exposures = EXPOSURES[row.quantizer] if equal_exposures else 1
        assert measurements - exposures < patterns.shape[0] * exposures <= measurements
        # The mean of two exposures has the noise over √2; of bit planes weighted 1/2, 1/4, ... over √3.
        averaged = {1: 1.0, 2: 2**-0.5, 8: 3**-0.5}[exposures]
        assert cli.datamodule.noise_level == pytest.approx(averaged, abs=1e-3)
        assert getattr(patterns, "clip", False) == ("clipped" in row.name)


def test_a_stopped_run_resumes_to_the_same_checkpoint(run):
    run("bsds_denoising", "fit")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(SolverModule, "on_train_epoch_start", cut_power_in_epoch_one)
        run("bsds_denoising", "fit", "--trainer.default_root_dir", "other")
    run("bsds_denoising", "fit", "--trainer.default_root_dir", "other", "--ckpt_path", "last")
    whole, resumed = (last_checkpoint(folder)["state_dict"] for folder in ("run", "other"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole if "_extra_state" not in key)


def test_without_learned_filters_as_the_config_says(run):
    options = ["--float_twin", "true", "--model.solver.init_args.channels", "0"]
    run("bsds_denoising", "fit", *options)
    run("bsds_denoising", "test", *options)
    names = set(last_checkpoint("run_float_twin")["state_dict"])
    assert names == {f"solver.{name}" for name in ("log_thresholds", "gradient_step_sizes", "pilot_weights")}


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(
    ("config", "file", "orders"),
    [
        ("single_pixel", "single_pixel_walsh", ["total_sequency"]),
        (
            "learned_patterns",
            "walsh_orders",
            ["total_sequency", "largest_sequency", "cake_cutting", "sequency", "natural"],
        ),
    ],
)
def test_rows_of_walsh_patterns_store_no_bits(monkeypatch, tmp_path, config, file, orders):
    monkeypatch.chdir(CONFIGS.parent)
    rows = read_rows([f"configs/rows/{file}.yaml"])
    assert {row.quantizer for row in rows} == {"zero_bit"}
    for row, order in zip(rows, orders, strict=True):
        cli = build(Run((f"--config=configs/{config}.yaml",), (), row, 0, 1e-3), str(tmp_path))
        [patterns] = [module for module in cli.model.modules() if isinstance(module, WalshPatterns)]
        assert torch.equal(patterns.matrix(), WalshPatterns(16, 64, order).matrix())
        if config == "single_pixel":
            assert torch.equal(cli.datamodule.operator.matrix(), patterns.matrix())
