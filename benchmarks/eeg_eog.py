"""Train, test and pack ``configs/eeg_eog.yaml``, one-bit and float twin, and write ``benchmarks/eeg_eog.md``.

``.venv/bin/python benchmarks/eeg_eog.py``; about ten minutes on one core.
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_modules.machine import machine

CONFIG = "configs/eeg_eog.yaml"
ROOT = Path("runs/eeg_eog")
METRICS = ("RRMSETemporal", "RRMSESpectral", "CorrelationCoefficient")


def verb(name: str, *options: str) -> float:
    """Run one verb of the command line; returns its seconds, Python's start included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lightning_modules", name, "--config", CONFIG, *options], check=True)
    return time.perf_counter() - start


def test_metrics(root: Path) -> list[float]:
    """The figures that the newest ``test`` of a run logged."""
    logs = sorted((root / "lightning_logs").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with logs[-1].open() as file:
        row = list(csv.DictReader(file))[-1]
    return [float(row[f"test/{metric}"]) for metric in METRICS]


def float_file(root: Path) -> Path:
    """The float twin's solver as a safetensors file."""
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    path = root / "solver.safetensors"
    save_file({key.removeprefix("solver."): value for key, value in state.items()}, path)
    return path


def main() -> None:
    """Run everything and write the table."""
    rows = []
    for name, root, options in (
        ("one-bit, one λ", ROOT, ()),
        ("float twin", ROOT.with_name(f"{ROOT.name}_float_twin"), ("--float_twin", "true")),
    ):
        fit, test = verb("fit", *options), verb("test", *options)
        if not options:
            verb("convert")
        path = float_file(root) if options else root / "solver.safetensors"
        figures = " | ".join(f"{figure:.3f}" for figure in test_metrics(root))
        rows.append(f"| {name} | {figures} | {path.stat().st_size:,} | {fit:.0f} | {test:.0f} |")
    table = [
        "# EEG, removal of eye movements",
        "",
        f"Written by `benchmarks/eeg_eog.py` from `{CONFIG}`: test subjects and recordings that training did not see,",
        "mean over -14, -12, ... +4 dB of power, one seed.",
        "",
        f"Machine: {machine()}",
        "",
        "| network | RRMSE temporal | RRMSE spectral | CC | file, bytes | fit, s | test, s |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    Path("benchmarks/eeg_eog.md").write_text("\n".join(table))
    print("\n".join(table))


if __name__ == "__main__":
    torch.set_num_threads(1)  # as many as the config gives the runs
    main()
