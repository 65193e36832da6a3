"""A training step of 64 blocks of 128 × 128 against the same weight as ``nn.Linear`` with a mask.

``.venv/bin/python benchmarks/training_step.py``; one thread, batch 64, forward, backward and Adam; about two minutes.
Times are medians of interleaved steps in one process. Memory is the growth of the peak resident size over three steps
in a process of its own, in which freed tensors go back to the system at once; by default, glibc keeps some of them,
which is the last column. Writes ``benchmarks/results/training_step.md``.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pibinn_plugin as pb
from lightning_modules.machine import machine
from pibinn_plugin.nn import BlockDiagonalLinear, CompactLinear

FEATURES, BLOCKS, BATCH, ROUNDS = 8192, 64, 64, 9
RESULTS = Path(__file__).parent / "results" / "training_step.md"


class MaskedLinear(nn.Linear):
    """The float layer that most would write: a dense weight times a mask."""

    def __init__(self) -> None:
        super().__init__(FEATURES, FEATURES, bias=False)
        self.register_buffer("mask", pb.BlockDiagonal(BLOCKS).mask((FEATURES, FEATURES)).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask)


def one_bit(layer: nn.Module) -> nn.Module:
    """The layer behind the sign quantizer."""
    structure = None if isinstance(layer, CompactLinear) else pb.BlockDiagonal(BLOCKS)
    return pb.prepare(nn.Sequential(layer), {"0.weight": structure})


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear times a mask, float": MaskedLinear,
    "nn.Linear with a structure, one-bit": lambda: one_bit(nn.Linear(FEATURES, FEATURES, bias=False)),
    "BlockDiagonalLinear, float": lambda: BlockDiagonalLinear(FEATURES, FEATURES, BLOCKS, bias=False),
    "BlockDiagonalLinear, one-bit": lambda: one_bit(BlockDiagonalLinear(FEATURES, FEATURES, BLOCKS, bias=False)),
}


def training_step(layer: nn.Module) -> Callable[[], None]:
    """One step of Adam on fixed data."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    x, target = torch.randn(2, BATCH, FEATURES)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()

    return step


def peak_bytes(name: str, **environment: str) -> int:
    """Growth of the peak resident size by three steps, in a fresh process."""
    command = [sys.executable, __file__, name]
    return int(subprocess.run(command, capture_output=True, check=True, env={**os.environ, **environment}).stdout)


def measure_memory(name: str) -> None:
    """In the fresh process: small steps first, so that what torch loads at first use is not counted."""
    training_step(one_bit(BlockDiagonalLinear(FEATURES, FEATURES, FEATURES // 8, bias=False)))()
    before = peak_resident_bytes()
    step = training_step(LAYERS[name]())
    for _ in range(3):
        step()
    print(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """Of this process. Linux's own count: getrusage's begins with the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measure_seconds() -> dict[str, list[float]]:
    """Interleaved steps of all layers; the first round is not counted."""
    steps = {name: training_step(make()) for name, make in LAYERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in LAYERS}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    """Measure and write the table."""
    seconds, by_default = measure_seconds(), {name: peak_bytes(name) for name in LAYERS}
    memory = {name: peak_bytes(name, MALLOC_MMAP_THRESHOLD_="65536") for name in LAYERS}
    reference = next(iter(LAYERS))
    lines = [
        f"# Training step: {BLOCKS} blocks in {FEATURES} × {FEATURES}, batch {BATCH}",
        "",
        f"`python benchmarks/training_step.py`. {machine()} Medians (least, greatest) of {ROUNDS} interleaved steps.",
        "",
        "| layer | ms | times faster | MB | times less | MB, glibc's heaps included |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        median, base = statistics.median(values), statistics.median(seconds[reference])
        spread = f"{1e3 * median:.1f} ({1e3 * min(values):.1f}, {1e3 * max(values):.1f})"
        sizes = f"{memory[name] / 1e6:.0f} | {memory[reference] / memory[name]:.1f}"
        lines.append(f"| {name} | {spread} | {base / median:.1f} | {sizes} | {by_default[name] / 1e6:.0f} |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure_memory(sys.argv[1]) if len(sys.argv) > 1 else main()
