"""Packed layers in AOTInductor's packages against their float twins, compiled likewise for batches of any size.

``.venv/bin/python benchmarks/aoti_packages.py``; one thread, two minutes, most of them compilation. Writes
``benchmarks/results/aoti_packages.md``.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import interleaved
from solver_inference import aot_compiled, aot_exported
from torch import nn

import pibinn_plugin as pb
from lightning_modules.machine import machine
from pibinn_plugin.nn import CompactLinear

SIZE, SECONDS = 512, 2.0
RESULTS = Path(__file__).parent / "results" / "aoti_packages.md"
HEAD = """# Layers in packages of AOTInductor

`python benchmarks/aoti_packages.py`. {machine} Layers of {size} × {size}. Process time of one call, the least; and how
many times faster packed is, the median of the ratios of turns, each of which begins with a call that is not timed.

| layer | batch | float, µs | packed, µs | times faster |
|---|---|---|---|---|"""


def layers() -> dict[str, tuple[Callable[[], nn.Module], pb.Structure | None]]:
    """Layers and their structures."""
    mask = pb.Mask(torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.1)
    uneven = pb.BlockDiagonal(rows=(112, 400), columns=(400, 112))

    def linear() -> nn.Module:
        return nn.Linear(SIZE, SIZE)

    return {
        "dense": (linear, None),
        "band of 11": (linear, pb.Banded(5, 5)),
        "mask of 10 %": (linear, mask),
        "two uneven blocks": (linear, uneven),
        "8 blocks": (linear, pb.BlockDiagonal(8)),
        "8 blocks, compact": (lambda: CompactLinear(SIZE, SIZE, pb.BlockDiagonal(8)), None),
        "convolution 64 → 64, 9, on 8": (
            lambda: nn.Sequential(nn.Unflatten(1, (64, 8)), nn.Conv1d(64, 64, 9, padding=4)),
            None,
        ),
    }


@torch.no_grad()
def rows(name: str, make: Callable[[], nn.Module], structure: pb.Structure | None) -> list[str]:
    """The Markdown lines of one layer."""
    floating = nn.Sequential(make()).eval()
    weight = next(name for name, _ in floating.named_parameters() if name.endswith("weight"))
    packed = pb.convert(pb.prepare(copy.deepcopy(floating), {weight: structure}))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        y = torch.randn(1, SIZE)
        forms = {"float": aot_compiled(floating, y, folder), "packed": aot_exported(packed, y, folder)}
        for batch in (1, 64):
            y = torch.randn(batch, SIZE)
            calls = {form: lambda run=run, y=y: run(y) for form, run in forms.items()}
            samples = interleaved(calls, SECONDS, time.process_time, warm=True)
            ratio = statistics.median(a / b for a, b in zip(samples["float"], samples["packed"], strict=True))
            times = " | ".join(f"{1e6 * min(samples[form]):,.0f}" for form in forms)
            lines.append(f"| {name} | {batch} | {times} | {ratio:.2f} |")
    return lines


def main() -> None:
    """Measure, print and write."""
    lines = [HEAD.format(machine=machine(), size=SIZE)]
    for name, (make, structure) in layers().items():
        lines += rows(name, make, structure)
        print(*lines[-2:], sep="\n", flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
