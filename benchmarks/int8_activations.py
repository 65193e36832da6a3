"""Int8 activations against exact products: error and time.

``.venv/bin/python benchmarks/int8_activations.py``; one thread, about a minute. Times are medians of interleaved calls
in one process, the activation scales included. Writes ``benchmarks/results/int8_activations.md``.
"""

import statistics
from functools import partial
from pathlib import Path

import torch
from interleaved import interleaved
from torch import Tensor

from lightning_modules.machine import machine
from pibinn_plugin import BlockDiagonal, Dense
from pibinn_plugin.functional import kernel, packed_linear, packed_linear_int8
from pibinn_plugin.packing import PackedSigns

RESULTS = Path(__file__).parent / "results" / "int8_activations.md"
COLUMNS, ROWS, SAMPLES = (64, 512, 4096, 32768), 256, 64
SHAPES = [  # blocks, rows, columns, batch
    (64, 512, 512, 1),
    (64, 512, 512, 8),
    (64, 512, 512, 16),
    (64, 512, 512, 64),
    (8, 512, 512, 64),
    (64, 256, 128, 512),
    (8, 64, 32, 1),
]
SCALE, SECONDS = torch.tensor([0.1]), 3.0


def activations(kind: str, columns: int) -> Tensor:
    """A batch whose samples differ in size, by up to a factor of ten."""
    x = torch.randn(SAMPLES, columns) * torch.logspace(0, 1, SAMPLES)[:, None]
    return x * (torch.rand(x.shape) < 0.1) if kind == "sparse" else x


def relative_error(x: Tensor, per_row: bool) -> tuple[float, float]:
    """The error's norm over that of the exact product: of the whole batch, and of its worst sample."""
    shape = (ROWS, x.shape[1])
    bits = PackedSigns.pack(torch.randn(shape), Dense(), shape).bits
    exact = packed_linear(x.double(), bits, SCALE, Dense(), shape)
    error = packed_linear_int8(x, bits, SCALE, Dense(), shape, per_row=per_row).double() - exact
    return (error.norm() / exact.norm()).item(), (error.norm(dim=1) / exact.norm(dim=1)).max().item()


def error_lines() -> list[str]:
    """The table of errors."""
    lines = [
        "| activations | columns | per row | its worst sample | per tensor | its worst sample |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("Gaussian", "sparse"):
        for columns in COLUMNS:
            x = activations(kind, columns)
            errors = [f"{100 * value:.2f} %" for per_row in (True, False) for value in relative_error(x, per_row)]
            lines.append(f"| {kind} | {columns} | {' | '.join(errors)} |")
    return lines


def seconds(blocks: int, rows: int, columns: int, batch: int) -> list[list[float]]:
    """Interleaved calls of the exact product and of that with int8 activations."""
    structure, shape = BlockDiagonal(blocks), (blocks * rows, blocks * columns)
    bits = torch.randint(0, 256, (-(-structure.nnz(shape) // 8),), dtype=torch.uint8)
    x = torch.randn(batch, shape[1])
    products = {"exact": packed_linear, "int8": packed_linear_int8}
    calls = {name: partial(product, x, bits, SCALE, structure, shape) for name, product in products.items()}
    return list(interleaved(calls, SECONDS).values())


def time_lines() -> list[str]:
    """The table of times."""
    lines = [
        "| blocks × rows × columns | batch | exact, ms | int8, ms | int8, quartiles | times faster | int8, GMAC/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for blocks, rows, columns, batch in SHAPES:
        exact, rounded = seconds(blocks, rows, columns, batch)
        low, median, high = statistics.quantiles(rounded, n=4)
        reference, rate = statistics.median(exact), blocks * rows * columns * batch / median / 1e9
        lines.append(
            f"| {blocks} × {rows} × {columns} | {batch} | {1e3 * reference:.3f} | {1e3 * median:.3f} | "
            f"{1e3 * low:.3f}–{1e3 * high:.3f} | {reference / median:.2f} | {rate:.0f} |"
        )
    return lines


def main() -> None:
    """Measure and write both tables."""
    torch.manual_seed(0)
    lines = [
        "# Int8 activations (W1A8)",
        "",
        f"`python benchmarks/int8_activations.py`. {machine()} Kernel: {kernel()}.",
        "",
        f"Error relative to the exact product (norms): {ROWS} rows, {SAMPLES} samples of sizes within a factor of ten.",
        "Sparse: nine of ten activations are zero.",
        "",
        *error_lines(),
        "",
        "Time of `functional.packed_linear` and `packed_linear_int8`, in float32, the activation scales included.",
        "",
        *time_lines(),
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        main()
