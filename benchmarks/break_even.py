"""How many times faster layers are on their bits than their float layers, from less than 1 to where it pays.

``pibinn_plugin/break_even.py`` and ``packed_convolutions.py`` decide by such tables. ``.venv/bin/python
benchmarks/break_even.py`` prints them for your machine, in ten minutes; ``--only WORD`` those with this word,
``--compiled`` those of graphs, in twenty: on bits, and reading the weight that the graph unpacks.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from interleaved import interleaved
from torch import Tensor, nn

import pibinn_plugin as pb
from lightning_modules.machine import machine
from pibinn_plugin.break_even import BreakEven
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed_convolutions import PackedConv1d, PackedConv2d

SECONDS = 0.15  # of a number
ALWAYS, NEVER = BreakEven(1, math.inf, True, True), BreakEven(math.inf, 0, False, False)

# A layer, its structure and its input, of a row and a column.
Make = Callable[[int, int], tuple[nn.Module, pb.Structure | None, Tensor]]


def dense(batch: int) -> Make:
    """Rows by columns."""
    return lambda rows, columns: (nn.Linear(columns, rows), None, torch.randn(batch, columns))


def blocks(count: int, batch: int) -> Make:
    """Rows by columns of a block."""
    structure = pb.BlockDiagonal(count)
    return lambda rows, columns: (
        CompactLinear(count * columns, count * rows, structure),
        structure,
        torch.randn(batch, count * columns),
    )


def mask(size: int) -> Make:
    """Samples by percent of nonzeros."""

    def make(batch: int, percent: int) -> tuple[nn.Module, pb.Structure, Tensor]:
        pattern = torch.rand(size, size, generator=torch.Generator().manual_seed(0)) < percent / 100
        return nn.Linear(size, size), pb.Mask(pattern), torch.randn(batch, size)

    return make


def band(size: int) -> Make:
    """Samples by diagonals, all that the layer has."""

    def make(batch: int, diagonals: int) -> tuple[nn.Module, pb.Structure, Tensor]:
        structure = pb.Banded(diagonals // 2, diagonals // 2)
        return CompactLinear(size, size, structure), structure, torch.randn(batch, size)

    return make


def convolution(kernel: int, size: int, batch: int) -> Make:
    """Channels by outputs."""
    return lambda channels, outputs: (
        nn.Conv2d(channels, outputs, kernel, padding=kernel // 2),
        None,
        torch.randn(batch, channels, size, size),
    )


FEW = (1, 2, 4, 8, 16, 24, 32, 64, 128, 512)
TABLES: dict[str, tuple[Make, tuple[int, ...], tuple[int, ...]]] = {
    **{f"dense, batch {b}: rows by columns": (dense(b), FEW, (*FEW, 2048)) for b in (1, 8, 64, 256)},
    **{
        f"{count} blocks, batch {b}: rows by columns": (blocks(count, b), FEW[1:8], FEW[1:8])
        for count in (64, 1000)
        for b in (1, 8, 64)
    },
    **{
        f"mask of {size} × {size}: batch by percent": (mask(size), (1, 2, 4, 16, 64, 256), (5, 10, 20, 30, 50))
        for size in (128, 512, 2048)
    },
    **{
        f"convolution {k} × {k}, {size} × {size}, batch {b}: channels by outputs": (
            convolution(k, size, b),
            (8, 16, 64),
            (4, 16, 32, 40, 64),
        )
        for k in (1, 3, 5)
        for size, b in ((24, 1), (24, 16))
    },
}
GRAPHS: dict[str, tuple[Make, tuple[int, ...], tuple[int, ...]]] = {
    **{f"dense, batch {b}: rows by columns": (dense(b), (16, 32, 64, 128), (16, 64, 128, 512)) for b in (1, 64)},
    **{
        f"{count} blocks, batch {b}: rows by columns": (blocks(count, b), (8, 32, 64), (8, 32, 64))
        for count in (8, 64)
        for b in (1, 64)
    },
    **{f"band of {size} × {size}: batch by diagonals": (band(size), (1, 64), (3, 11, 51)) for size in (128, 512)},
}


def packed_layer(layer: nn.Module, structure: pb.Structure | None, choice: BreakEven) -> nn.Module:
    """It decides by what it is told."""
    packed = pb.convert(pb.prepare(copy.deepcopy(nn.Sequential(layer)), {"0.weight": structure})).eval()
    if hasattr(packed[0], "_break_even"):
        packed[0]._break_even = choice
    return packed


@torch.no_grad()
def times_faster(layer: nn.Module, structure: pb.Structure | None, x: Tensor, compiled: bool) -> str:
    """The time of a layer in floats, divided by that of its packed forms: the least process time of each."""
    forms = {"float": nn.Sequential(layer).eval(), "bits": packed_layer(layer, structure, ALWAYS)}
    if compiled:
        forms["read"] = packed_layer(layer, structure, NEVER)
        torch._dynamo.reset()
        forms = {name: torch.compile(form, fullgraph=True, dynamic=False) for name, form in forms.items()}
    functions = {name: lambda form=form: form(x) for name, form in forms.items()}
    samples = interleaved(functions, SECONDS, time.process_time, warm=True)
    return "/".join(f"{min(samples['float']) / min(samples[name]):.2f}" for name in forms if name != "float")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--compiled", action="store_true")
    only, compiled = (given := parser.parse_args()).only, given.compiled
    print(machine())
    for name, (make, rows, columns) in (GRAPHS if compiled else TABLES).items():
        if only in name:
            print(f"\n{name}\n{'':>6}", *(f"{column:>9}" for column in columns))
            for row in rows:
                print(
                    f"{row:>6}", *(f"{times_faster(*make(row, column), compiled):>9}" for column in columns), flush=True
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    always = {"_is_faster": lambda convolution, input: True}
    with patch.multiple(PackedConv1d, **always), patch.multiple(PackedConv2d, **always):
        main()
