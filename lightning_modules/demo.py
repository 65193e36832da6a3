"""``pibinn demo``: what one bit is good for, in a table and a picture, in under three minutes.

An instrument measures 512 unknowns by an operator of ±1 whose support is known and whose signs are not. They are
learned from 60 noisy pairs, in one bit each with one scale λ, and in the weights of others. All rows train alike, and
from the signs that fit the pairs best; float weights are also shown from plain least squares. Everything lands in
``runs/demo``. The whole comparison, with three seeds and a search, is benchmarks/results/calibration_60.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import nn

import pibinn_plugin as pb
from lightning_modules.analysis.plots import save_figure
from lightning_modules.compare.callback import BaselineQAT
from lightning_modules.compare.storage import load_baseline, save_baseline, stored_size
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.metrics import NMSE
from lightning_modules.modules import SolverModule
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.calibrated_amp import CalibratedAMP

FOLDER = Path("runs/demo")
PAIRS, EPOCHS, TRAIN_EXAMPLES = 60, 6, 3000
TARGETS = {"solver.operator.weight": None}  # the structure that the weight has
PAIRS_OF_BATCH = pb.SignsFromPairs(inputs=1, outputs=0)  # the operator maps unknowns to measurements; a batch is (y, x)


@dataclass
class Row:
    """A network of the table: its name, the callback that quantizes it, and what it got."""

    name: str
    callback: pl.Callback
    file: Path | None = None
    nmse: float = 0.0


def rows() -> list[Row]:
    """The networks of the table, from the simplest to what cannot be had."""

    def baseline(name: str, quantizer: str, solution: str) -> Row:
        return Row(name, BaselineQAT(TARGETS, quantizer, 0, PAIRS_OF_BATCH, solution))

    one_bit = pb.TwoStageQAT(TARGETS, scale_stage_start=0, initialization=PAIRS_OF_BATCH)
    return [
        baseline("float, from least squares", "fp32", "ridge"),
        baseline("float, from the one-bit start", "fp32", "signs"),
        baseline("ternary b1.58, from the one-bit start", "ternary_b158", "signs"),
        Row("one bit, one scale", one_bit),
        baseline("the true operator, given", "oracle", "ridge"),
    ]


def build_solver() -> CalibratedAMP:
    """12 iterations that share one operator of 8 blocks of 32 × 64."""
    return CalibratedAMP(measurements=256, unknowns=512, structure=pb.BlockDiagonal(8), layers=12)


def training_pairs() -> SparseRecovery:
    """60 pairs at 20 dB, gone through again and again; others to test on."""
    operator = SignBlocks(blocks=8, rows=32, columns=64, seed=1)
    return SparseRecovery(operator, snr_db=20.0, batch_size=PAIRS, train_examples=TRAIN_EXAMPLES, training_pairs=PAIRS)


def train(row: Row) -> None:
    """Train the network of a row, store it, load it back, and measure what was loaded."""
    pl.seed_everything(0, verbose=False)
    module = SolverModule(build_solver(), learning_rate=1e-5, scalar_learning_rate=5e-3, scale_learning_rate=0.03)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        callbacks=[RichProgressBar(), row.callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=training_pairs())
    path = FOLDER / f"{''.join(letter if letter.isalnum() else '_' for letter in row.name)}.safetensors"
    if isinstance(row.callback, pb.TwoStageQAT):
        row.file = pb.save(pb.convert(module.solver), path)
        row.nmse = nmse_of(pb.load(path))  # the file says how its solver is built
    else:
        assert isinstance(row.callback, BaselineQAT)
        row.file = save_baseline(module.solver, row.callback.quantizer, path)
        row.nmse = nmse_of(load_baseline(path, build_solver()))


@torch.no_grad()
def nmse_of(solver: nn.Module) -> float:
    """Test NMSE in dB."""
    data = training_pairs()
    data.setup()
    y, x = data.test_set.tensors
    return float(NMSE()(solver.eval()(y), x))


def draw(finished: list[Row], path: Path) -> Path:
    """One point a row: error against the bytes of its file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for row in finished:
        assert row.file is not None
        size, is_ours = row.file.stat().st_size, isinstance(row.callback, pb.TwoStageQAT)
        axes.semilogx(size, row.nmse, "o", markersize=9, color="black" if is_ours else "0.6")
        axes.annotate(row.name, (size, row.nmse), xytext=(9, 7), textcoords="offset points", fontsize="small")
    axes.set(xlabel="bytes of the file", ylabel="test NMSE, dB (lower is better)", xlim=(1e3, 1e6))
    axes.margins(y=0.15)
    axes.grid(True, color="0.9")
    return save_figure(figure, path)


def command(args: Sequence[str]) -> None:
    """Run the command, which has no options."""
    argparse.ArgumentParser(
        prog="pibinn demo",
        description="Learn an operator of ±1 from 60 pairs in one bit a weight, ternary and float: errors and bytes in "
        f"one table and a picture, in {FOLDER}.",
    ).parse_args(list(args))
    main()


def main(report: Callable[[object], None] | None = None) -> None:
    """Train all rows, print one table, and draw it."""
    report = report or Console(width=100).print
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*pairs for rows of.*")  # that they are few is the point
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the operations are too small to share: a second thread would only be waited for
    finished = rows()
    for number, row in enumerate(finished, 1):
        report(f"{number}/{len(finished)}  {row.name}")
        train(row)
    table = Table(title=f"an operator of ±1, learned from {PAIRS} pairs at 20 dB; its support is known")
    table.add_column("network")
    for column in ("test NMSE, dB", "weights, bytes", "file, bytes"):
        table.add_column(column, justify="right")
    for row in finished:
        assert row.file is not None
        size = stored_size(row.file)
        table.add_row(row.name, f"{row.nmse:.2f}", f"{size.weight_bits // 8:,}", f"{size.file_bytes:,}")
    report(table)
    report(f"files: {FOLDER}")
    if find_spec("matplotlib") is None:
        report("for the picture: pip install pibinn-plugin[plot]")
    else:
        report(f"picture: {draw(finished, FOLDER / 'error_against_bytes.png')}")


if __name__ == "__main__":
    main()
