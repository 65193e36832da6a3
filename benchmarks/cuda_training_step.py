"""The training step of `training_step`, on a CUDA device.

``.venv/bin/python benchmarks/cuda_training_step.py``; seconds. Times are medians of interleaved steps, by the device's
own clock. Memory is the growth of the peak of what torch has allocated. Writes
``benchmarks/results/cuda_training_step.md``.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from training_step import BATCH, BLOCKS, FEATURES, LAYERS, training_step

RESULTS = Path(__file__).parent / "results" / "cuda_training_step.md"
ROUNDS, STEPS = 15, 5  # steps of a sample: the device is to be busy, not to wait for Python


def milliseconds(step: Callable[[], None]) -> float:
    """Of one step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(STEPS):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / STEPS


def peak_bytes(make: Callable[[], nn.Module]) -> int:
    """Growth of the peak of allocated memory by a layer and three steps of it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = training_step(make())
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Measure and write the table."""
    torch.set_default_device("cuda")
    memory = {name: peak_bytes(make) for name, make in LAYERS.items()}
    steps = {name: training_step(make()) for name, make in LAYERS.items()}
    samples: dict[str, list[float]] = {name: [] for name in LAYERS}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            samples[name].append(milliseconds(step))
    reference = next(iter(LAYERS))
    base = statistics.median(samples[reference][1:])
    lines = [
        f"# Training step on a CUDA device: {BLOCKS} blocks in {FEATURES} × {FEATURES}, batch {BATCH}",
        "",
        f"`python benchmarks/cuda_training_step.py` on {torch.cuda.get_device_name()}, torch {torch.__version__}. "
        f"Eager; medians (least, greatest) of {ROUNDS} interleaved samples of {STEPS} steps of Adam.",
        "",
        "| layer | ms | times faster | MB | times less |",
        "|---|---|---|---|---|",
    ]
    for name, (_, *values) in samples.items():
        median = statistics.median(values)
        lines.append(
            f"| {name} | {median:.2f} ({min(values):.2f}, {max(values):.2f}) | {base / median:.1f} "
            f"| {memory[name] / 1e6:.0f} | {memory[reference] / memory[name]:.1f} |"
        )
    RESULTS.write_text("\n".join(lines) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
