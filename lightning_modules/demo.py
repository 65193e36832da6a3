"""``python -m lightning_modules.demo``: the whole workflow on generated data, in about two minutes.

Sparse recovery with a known ±1 operator: train the float twin, train the one-bit network in two stages, convert, save,
load back, and compare. Everything lands in ``runs/demo``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import pibinn_plugin as pb
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.metrics import NMSE
from lightning_modules.modules import SolverModule
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA

FOLDER = Path("runs/demo")
EPOCHS = 10
TARGETS = {"solver.layers.*.weight": None}


def build_solver() -> CoupledISTA:
    """The solver of the demo: 12 layers of 8 blocks of 64 × 32, started at the adjoint of the operator."""
    return CoupledISTA(SignBlocks(blocks=8, rows=32, columns=64, seed=0), layers=12)


def train(
    name: str, learning_rate: float, scalar_learning_rate: float, callbacks: list[pl.Callback]
) -> tuple[SolverModule, float]:
    """Train one network; returns it with its test NMSE in dB."""
    pl.seed_everything(0, verbose=False)
    solver = build_solver()
    module = SolverModule(solver, [NMSE()], learning_rate, scalar_learning_rate)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        default_root_dir=FOLDER / name,
        callbacks=[RichProgressBar(), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = SparseRecovery(solver.operator)
    trainer.fit(module, datamodule=data)
    return module, trainer.test(module, datamodule=data, verbose=False)[0]["test/NMSE"]


def evaluate(solver: torch.nn.Module) -> float:
    """Test NMSE in dB of a solver outside Lightning."""
    data = SparseRecovery(build_solver().operator)
    data.setup()
    y, x = data.test_set.tensors
    with torch.no_grad():
        return float(NMSE()(solver(y), x))


def main() -> None:
    """Train, convert, save, load back, and print one table."""
    console = Console(width=max(100, Console().width))
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the operations are too small to share: a second thread would only be waited for
    console.rule("1/3  float twin: the same network with fp32 weights")
    twin, twin_nmse = train("float_twin", 1e-2, 1e-2, [])
    twin_file = FOLDER / "float_twin.safetensors"
    save_file(twin.solver.state_dict(), twin_file)

    console.rule("2/3  one-bit network: stage 1 (signs and λ), then stage 2 (λ and step sizes)")
    one_bit, one_bit_nmse = train("one_bit", 2e-4, 2e-2, [pb.TwoStageQAT(TARGETS, scale_stage_start=0.75)])

    console.rule("3/3  convert, save, load back")
    packed = pb.convert(one_bit.solver)
    packed_file = pb.save(packed, FOLDER / "one_bit.safetensors")
    loaded = pb.load(packed_file)  # it says how its solver is built
    report = pb.summary(loaded)
    print(report)
    table = Table(title="sparse recovery, 512 unknowns from 256 measurements at 40 dB")
    for column, justify in (("network", "left"), ("test NMSE, dB", "right"), ("bytes", "right"), ("where", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_row("fp32, dense (counted)", "", f"{report.float_twin_bytes:,}", "")
    table.add_row("float twin, fp32 blocks", f"{twin_nmse:.2f}", f"{twin_file.stat().st_size:,}", str(twin_file))
    table.add_row("one-bit, as trained", f"{one_bit_nmse:.2f}", "", "")
    table.add_row(
        "one-bit, packed file", f"{evaluate(loaded):.2f}", f"{packed_file.stat().st_size:,}", str(packed_file)
    )
    console.print(table)


if __name__ == "__main__":
    main()
