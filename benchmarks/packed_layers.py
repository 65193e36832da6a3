"""Packed networks against their float twins, by kind of layer: eager and compiled, batch 1 and 64.

``.venv/bin/python benchmarks/packed_layers.py`` takes some twenty minutes, most of them compilation, and writes
``benchmarks/results/packed_layers.md``; ``--only WORD`` prints the cases with this word, ``--eager`` compiles nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import interleaved
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pibinn_plugin as pb
from lightning_modules.machine import machine
from lightning_modules.solvers.calibrated_amp import CalibratedAMP
from lightning_modules.solvers.hidden_lista import HiddenLISTA
from pibinn_plugin.functional import kernel
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import unpacked_bytes

RESULTS = Path(__file__).parent / "results" / "packed_layers.md"
BATCHES = (1, 64)
SECONDS = 3.0  # of a row

Case = tuple[Callable[[], nn.Module], pb.workflow.Targets, Callable[[int], Tensor]]


class RawParameters(nn.Module):
    """Eight square matrices, each multiplied by as ``x @ W.T``."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(1024, 1024) / 32 for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = (x @ matrix.T).relu()
        return x


class RawLISTA(nn.Module):
    """LISTA as it is often written: two matrices of its own for each of ten iterations, no layer modules."""

    def __init__(self, rows: int = 250, columns: int = 500, iterations: int = 10) -> None:
        super().__init__()
        self.inputs = nn.ParameterList(torch.randn(columns, rows) / 16 for _ in range(iterations))
        self.states = nn.ParameterList(torch.randn(columns, columns) / 22 for _ in range(iterations))

    def forward(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), self.states[0].shape[0])
        for input, state in zip(self.inputs, self.states, strict=True):
            x = nn.functional.softshrink(y @ input.T + x @ state.T, 0.1)
        return x


class TiedDictionary(nn.Module):
    """Sixteen iterations of ISTA and the reconstruction, all with one dictionary: it is read 33 times."""

    def __init__(self, rows: int = 250, columns: int = 500) -> None:
        super().__init__()
        self.dictionary = nn.Parameter(torch.randn(rows, columns) / 16)

    def forward(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), self.dictionary.shape[1])
        for _ in range(16):
            x = nn.functional.softshrink(x + 0.1 * ((y - x @ self.dictionary.T) @ self.dictionary), 0.01)
        return x @ self.dictionary.T


class CachedDictionary(TiedDictionary):
    """The same, which lets torch read a parametrized weight once for the whole pass."""

    def forward(self, y: Tensor) -> Tensor:
        with parametrize.cached():
            return super().forward(y)


class Read(nn.Module):
    """No product at all: what reading a weight takes, and the call of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix


class BasicBlock(nn.Module):
    """The block of ResNet18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(hidden)) + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    """Its 17 convolutions of 3 × 3 and its shortcuts, for images of 32 × 32."""
    sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [BasicBlock(*size) for size in [*sizes, (512, 512, 1)]]
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def layer(module: Callable[[], nn.Module], *features: int, structure: pb.Structure | None = None) -> Case:
    """One layer."""
    return lambda: nn.Sequential(module()), {"0.weight": structure}, lambda batch: torch.randn(batch, *features)


def cases() -> dict[str, Case]:
    """Networks, what is packed of them, and their inputs."""
    generator = torch.Generator().manual_seed(0)
    mask = pb.Mask(torch.rand(512, 512, generator=generator) < 0.1)
    half = pb.Mask(torch.rand(512, 512, generator=generator) < 0.5)
    masks = [pb.Mask(torch.rand(*shape, generator=generator) < 0.1) for shape in ((1024, 1024), (64, 64, 3, 3))]
    uneven = pb.BlockDiagonal(rows=(100, 200, 300), columns=(300, 200, 100))
    blocks = pb.BlockDiagonal(8)
    return {
        "linear 1024 × 1024": layer(lambda: nn.Linear(1024, 1024), 1024),
        "linear 256 × 128": layer(lambda: nn.Linear(128, 256), 128),
        "linear 16 × 16": layer(lambda: nn.Linear(16, 16), 16),
        "linear 512 × 512, mask of 10 %": layer(lambda: nn.Linear(512, 512), 512, structure=mask),
        "linear 512 × 512, mask of 50 %": layer(lambda: nn.Linear(512, 512), 512, structure=half),
        "linear 1 × 512": layer(lambda: nn.Linear(512, 1), 512),
        "compact, 64 blocks 512 × 512": layer(lambda: CompactLinear(32768, 32768, pb.BlockDiagonal(64)), 32768),
        "compact, 8 blocks 64 × 32": layer(lambda: CompactLinear(256, 512, blocks), 256),
        "compact, 1,000 blocks 4 × 4": layer(lambda: CompactLinear(4000, 4000, pb.BlockDiagonal(1000)), 4000),
        "compact, 3 uneven blocks": layer(lambda: CompactLinear(600, 600, uneven), 600),
        "compact, mask of 10 % of 512 × 512": layer(lambda: CompactLinear(512, 512, mask), 512),
        "compact, band of 11 of 512 × 512": layer(lambda: CompactLinear(512, 512, pb.Banded(5, 5)), 512),
        "conv1d 64 → 64, 9, on 128": layer(lambda: nn.Conv1d(64, 64, 9, padding=4), 64, 128),
        "conv1d 16 → 16, 5, stride 2, on 1,000": layer(lambda: nn.Conv1d(16, 16, 5, 2), 16, 1000),
        "conv2d 64 → 64, 3 × 3, on 16 × 16": layer(lambda: nn.Conv2d(64, 64, 3, padding=1), 64, 16, 16),
        "conv2d 64 → 64, 3 × 3, on 16 × 16, mask of 10 %": layer(
            lambda: nn.Conv2d(64, 64, 3, padding=1), 64, 16, 16, structure=masks[1]
        ),
        "conv2d 256 → 256, 3 × 3, on 4 × 4": layer(lambda: nn.Conv2d(256, 256, 3, padding=1), 256, 4, 4),
        "conv2d 1 → 49, 7 × 7, on 64 × 64": layer(lambda: nn.Conv2d(1, 49, 7, padding=3), 1, 64, 64),
        "conv2d of 64 channels apart, 3 × 3, on 32 × 32": layer(
            lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), 64, 32, 32
        ),
        "EEG network (configs/eeg_eog.yaml)": (HiddenLISTA, {"*.weight": None}, lambda batch: torch.randn(batch, 512)),
        "8 raw parameters 1024 × 1024": (
            RawParameters,
            {"matrices.*": None},
            lambda batch: torch.randn(batch, 1024),
        ),
        "the same, masks of 10 %": (
            RawParameters,
            {"matrices.*": masks[0]},
            lambda batch: torch.randn(batch, 1024),
        ),
        "LISTA of raw parameters": (
            RawLISTA,
            {"inputs.*": None, "states.*": None},
            lambda batch: torch.randn(batch, 250),
        ),
        "tied dictionary, read 33 times": (
            TiedDictionary,
            {"dictionary": None},
            lambda batch: torch.randn(batch, 250),
        ),
        "the same in torch's parametrize.cached()": (
            CachedDictionary,
            {"dictionary": None},
            lambda batch: torch.randn(batch, 250),
        ),
        "a raw parameter 16 × 16, read alone": (Read, {"matrix": None}, torch.randn),
        "solver, 8 blocks 32 × 64, 16 layers": (
            lambda: CalibratedAMP(256, 512, blocks, 16),
            {"operator.weight": None},
            lambda batch: torch.randn(batch, 256),
        ),
        "ResNet18 on 32 × 32": (resnet18, {"*.weight": None}, lambda batch: torch.randn(batch, 3, 32, 32)),
    }


def targets_of(model: nn.Module, patterns: pb.workflow.Targets) -> pb.workflow.Targets:
    """The patterns; every convolution for the one that names all weights, which norms have too."""
    if "*.weight" not in patterns:
        return patterns
    convolutions = (nn.Conv1d, nn.Conv2d)
    return {f"{name}.weight": None for name, module in model.named_modules() if isinstance(module, convolutions)}


@torch.no_grad()
def row(name: str, case: Case, batch: int, compiles: bool) -> str:
    """The Markdown line of one case."""
    torch.manual_seed(0)
    make, patterns, input_of = case
    floating, x = make().eval(), input_of(batch)
    packed = pb.convert(pb.prepare(make().eval(), targets_of(floating, patterns), "native")).eval()
    forms: dict[str, nn.Module] = {"float": floating, "packed": packed}
    if compiles:
        torch._dynamo.reset()
        forms |= {f"{form}, compiled": torch.compile(module, fullgraph=True) for form, module in forms.items()}
    functions = {form: lambda module=module: module(x) for form, module in forms.items()}
    samples = interleaved(functions, SECONDS, time.process_time, warm=True)
    cells = [name, str(batch)]
    for suffix in ("", ", compiled") if compiles else ("",):
        pair = [samples[f"{form}{suffix}"] for form in ("float", "packed")]
        cells += [f"{1e6 * min(times):,.0f}" for times in pair]
        cells.append(f"{statistics.median(a / b for a, b in zip(*pair, strict=True)):.2f}")
    return f"| {' | '.join([*cells, f'{unpacked_bytes(packed) / 1024:,.0f}'])} |"


def main() -> None:
    """Measure, print and, where all is measured, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    head = ["network", "batch", "float, µs", "packed, µs", "times faster"]
    head += [] if options.eager else ["float compiled, µs", "packed compiled, µs", "times faster"]
    lines = [
        "# Packed networks against their float twins",
        "",
        f"`python benchmarks/packed_layers.py`. {machine()} Path of the kernel: {kernel()}. Inference, float32.",
        "Process time of one call, the least; and how many times faster packed is, the median of the ratios of turns,",
        "each of which begins with a call that is not timed. Last, what is kept unpacked after the eager calls.",
        "",
        f"| {' | '.join([*head, 'kept, KiB'])} |",
        "|---" * (len(head) + 1) + "|",
    ]
    print(*lines, sep="\n", flush=True)
    for name, case in cases().items():
        for batch in BATCHES if options.only in name else ():
            lines.append(row(name, case, batch, not options.eager))
            print(lines[-1], flush=True)
    if not options.only and not options.eager:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
