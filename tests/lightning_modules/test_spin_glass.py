"""The spin glass from its configuration: fit, test, convert, and a comparison whose test metrics are its own."""

from pathlib import Path

import pytest
import torch

from lightning_modules.cli import main
from lightning_modules.compare.comparison import compare
from lightning_modules.compare.rows import read_rows
from lightning_modules.compare.table import terminal_table
from lightning_modules.data.spin_samples import SpinSamples
from pibinn_plugin import load

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "--config", str(CONFIGS / "spin_glass.yaml"), "--model.solver.init_args.size=6", "--data.size=6",
    "--data.training_samples=80", "--trainer.max_epochs=3", "--data.sweeps=50",
]  # fmt: skip


def test_couplings_are_found_tested_and_packed(tmp_path, capsys):
    options = [*SMALL, "--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar=false"]
    main(["fit", *options])
    main(["convert", *options])
    packed = load(tmp_path / "solver.safetensors")
    assert torch.equal(packed.weight.sign(), SpinSamples(size=6).couplings.sign())
    capsys.readouterr()
    main(["test", *options, "--packed", str(tmp_path / "solver.safetensors")])
    printed = capsys.readouterr().out
    assert "test/NMSE" in printed
    assert "test/SignAccuracy" in printed
    assert "test/PseudoLikelihood" not in printed


@pytest.mark.slow
def test_a_comparison_chooses_by_samples_and_shows_couplings(tmp_path):
    rows = [row for row in read_rows([str(CONFIGS / "rows" / "spin_glass.yaml")]) if "trained" not in row.name]
    comparison = compare(SMALL, rows, [0], [1e-5], tmp_path, lambda line: None)
    assert comparison.metric.name == "PseudoLikelihood"
    assert comparison.test_metric.name == "NMSE"
    lines = {line.row.name: line for line in comparison.lines}
    assert len(lines) == len(rows)
    tried = {name: [result["run"]["start"] for result in line.search] for name, line in lines.items()}
    assert tried["fp32"] == tried["ternary_b158"] == ["ridge", "box", "signs", "ternary"]
    assert tried["fp32, ridge"] == ["ridge"]
    assert tried["global"] == [None]
    errors = {name: line.results[0]["test"]["NMSE"] for name, line in lines.items()}
    assert errors["global"] < -20 < errors["fp32, box"]
    assert abs(errors["fp32"] - errors["global"]) < 1  # from the same start
    sizes = {name: line.results[0]["weight_bits"] for name, line in lines.items()}
    assert sizes["global"] < sizes["ternary_b158"] < sizes["fp32"]
    assert set(lines["global"].results[0]["val"]) == {"PseudoLikelihood"}
    assert " - " in terminal_table(comparison)  # no gap between unlike sets
