"""A whole unrolled solver with a learned operator: packed signs against fp32 blocks and against the fp32 dense form.

``.venv/bin/python benchmarks/solver_inference.py``; `CalibratedAMP` with 16 layers, blocks of 32 × 64, one thread; five
minutes, most of them compilation. Medians of interleaved calls. Writes ``benchmarks/results/solver_inference.md``.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import pibinn_plugin as pb
from lightning_modules.machine import machine
from lightning_modules.solvers.calibrated_amp import CalibratedAMP
from pibinn_plugin.functional import kernel

LAYERS, ROWS, COLUMNS = 16, 32, 64
CASES = [(8, 1), (8, 64), (64, 1), (64, 64)]  # blocks, batch
SECONDS_FOR_EACH, ROUNDS = 0.2, 15
RESULTS = Path(__file__).parent / "results" / "solver_inference.md"

Solver = Callable[[Tensor], Tensor]


def packed_twin(solver: CalibratedAMP) -> nn.Module:
    """The solver on packed signs."""
    prepared = CalibratedAMP(*solver.shape, solver.structure, LAYERS)
    prepared.load_state_dict(solver.state_dict())
    return pb.convert(pb.prepare(prepared, {"operator.weight": None})).eval()


def aot_compiled(solver: nn.Module, y: Tensor, folder: str) -> Solver:
    """The float solver as AOTInductor compiles and loads it: what a program without Python would run.

    For batches of any size, as packed solvers are exported: one that is fixed to 1 lets the compiler fuse more.
    """
    program = torch.export.export(solver, (torch.cat([y, y]),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = f"{folder}/float.pt2"
    return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=path))


def aot_exported(packed: nn.Module, y: Tensor, folder: str) -> Solver:
    """The packed solver, exported likewise: its signs are unpacked when it is loaded."""
    return torch._inductor.aoti_load_package(str(pb.export(packed, f"{folder}/packed.pt2", (y,), "aoti")))


def solvers(blocks: int, y: Tensor, folder: str) -> dict[str, Solver]:
    """Every form of one solver; the dense one has other weights, which does not matter to its time."""
    torch.manual_seed(0)
    shape = (blocks * ROWS, blocks * COLUMNS)
    floating = CalibratedAMP(*shape, pb.BlockDiagonal(blocks), LAYERS).eval()
    packed = packed_twin(floating)
    torch._dynamo.reset()
    return {
        "fp32 dense, eager": CalibratedAMP(*shape, pb.Dense(), LAYERS).eval(),
        "fp32 blocks, eager": floating,
        "fp32 blocks, compiled": torch.compile(floating, fullgraph=True),
        "fp32 blocks, AOTInductor": aot_compiled(floating, y, folder),
        "one-bit, eager": packed,
        "one-bit, compiled": torch.compile(packed, fullgraph=True),
        "one-bit, AOTInductor": aot_exported(packed, y, folder),
    }


def microseconds(solver: Solver, y: Tensor) -> float:
    """Of one call, the mean over a fifth of a second of calls."""
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS_FOR_EACH / ROUNDS:
        solver(y)
        calls += 1
    return 1e6 * elapsed / calls


def measure(blocks: int, batch: int) -> dict[str, list[float]]:
    """Interleaved rounds of all forms."""
    y = torch.randn(batch, blocks * ROWS)
    with tempfile.TemporaryDirectory() as folder:
        with torch.no_grad():  # not in inference mode: nothing is kept for what is made there
            forms = solvers(blocks, y, folder)
        with torch.inference_mode():
            for solver in forms.values():
                solver(y)
                solver(y)
            rounds = [{name: microseconds(solver, y) for name, solver in forms.items()} for _ in range(ROUNDS)]
    return {name: [measured[name] for measured in rounds] for name in forms}


def table(blocks: int, batch: int) -> list[str]:
    """The Markdown lines of one case."""
    times = measure(blocks, batch)
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = [
        f"## {blocks * COLUMNS} unknowns ({blocks} blocks {ROWS} × {COLUMNS}), batch {batch}",
        "",
        "| form | µs | against fp32 blocks compiled | against fp32 dense eager |",
        "|---|---|---|---|",
    ]
    for name, values in times.items():
        ratios = [medians[base] / medians[name] for base in ("fp32 blocks, compiled", "fp32 dense, eager")]
        spread = f"{medians[name]:.0f} ({min(values):.0f}, {max(values):.0f})"
        lines.append(f"| {name} | {spread} | {ratios[0]:.2f} | {ratios[1]:.1f} |")
    return [*lines, ""]


def main() -> None:
    """Measure and write the tables."""
    lines = [
        f"# Inference of a whole solver: {LAYERS} layers, learned operator",
        "",
        f"`python benchmarks/solver_inference.py`. {machine()} Path of the kernel: {kernel()}. Medians (least, "
        f"greatest) of {ROUNDS} interleaved rounds; the last columns say how many times faster a form is.",
        "",
    ]
    for blocks, batch in CASES:
        lines += table(blocks, batch)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines))
    print(RESULTS.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
