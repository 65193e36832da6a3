"""Products with one-bit weights against the ternary formats of ggml, TQ2_0 and TQ1_0, whose activations are int8.

    python benchmarks/ggml_peers.py FOLDER

One thread, a minute; writes ``benchmarks/results/ggml_peers.md``. FOLDER has ggml's shared libraries, built for this
processor from the source that the package ggml-python brings::

    pip download --no-deps --no-binary :all: ggml-python && tar xzf ggml_python-*.tar.gz
    cmake -B FOLDER -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DCMAKE_BUILD_TYPE=Release \
        ggml_python-*/vendor/ggml
    cmake --build FOLDER --target ggml-cpu
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compiled_library import compiled_library
from interleaved import interleaved
from torch import Tensor

from lightning_modules.machine import machine
from pibinn_plugin import BlockDiagonal, convert, prepare
from pibinn_plugin.functional import kernel
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import use_int8_activations

RESULTS = Path(__file__).parent / "results" / "ggml_peers.md"
CASES = [(64, 512, 512, batch) for batch in (1, 8, 64)]
BLOCK = 256  # weights that share a scale
BYTES = {"tq2_0": 66, "tq1_0": 54}  # of such a block
ROUNDED_BYTES = 292  # of a block of activations: its scale, its values and their sums
SECONDS = 6.0
LARGEST_ERROR = 0.03  # of activations that are rounded to int8, in norm

TEXT = """# Against the ternary formats of ggml

`python benchmarks/ggml_peers.py FOLDER`. {machine} Kernel: {kernel}. Weights of ±λ, which all of them hold
without loss; block-diagonal layers, float32 activations, weights in the caches. Exact: a packed layer as it is. Int8:
with `use_int8_activations`. ggml rounds activations to int8 too, with a scale for each 256 of them; this is part of its
time, as it is of ours. Process time, medians of calls in turns, and how many times longer ggml takes than exact.

| blocks × rows × columns, batch | exact, µs (quartiles) | int8, µs | {names} |
|---|---|---|{lines}
"""


class Ggml:
    """The dot products of ggml's libraries in a folder."""

    def __init__(self, folder: Path) -> None:
        libraries = {path.name: path for path in folder.rglob("libggml-*.so")}
        self.base = ctypes.CDLL(str(libraries["libggml-base.so"]), ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(libraries["libggml-cpu.so"]))
        self.cpu.ggml_cpu_init()
        self.loop = compiled_library("ggml_loop.cpp")
        self.buffers: list[Tensor] = []  # alive, since calls have their addresses alone

    def product(self, name: str, weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
        """The product of a compact weight (blocks, rows, columns) in one of the formats."""
        blocks, rows, columns = weight.shape
        row_bytes = columns // BLOCK * BYTES[name]
        packed = torch.empty(blocks * rows * row_bytes, dtype=torch.uint8)
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        quantize = getattr(self.base, f"quantize_{name}")
        quantize.argtypes, quantize.restype = [pointer, pointer, number, number, pointer], size
        weight = weight.contiguous()
        assert quantize(weight.data_ptr(), packed.data_ptr(), blocks * rows, columns, None) == packed.numel()
        rounded_bytes = columns // BLOCK * ROUNDED_BYTES
        rounded = torch.empty(len(x) * rounded_bytes, dtype=torch.uint8)
        y = torch.empty(len(x), blocks * rows)
        arguments = (
            ctypes.cast(getattr(self.cpu, f"ggml_vec_dot_{name}_q8_K"), pointer),
            ctypes.cast(self.cpu.quantize_row_q8_K, pointer),
            *(pointer(packed.data_ptr()), size(row_bytes), pointer(x.data_ptr())),
            *(pointer(rounded.data_ptr()), size(rounded_bytes), pointer(y.data_ptr())),
            *(blocks, rows, columns, len(x)),
        )

        self.buffers += [packed, rounded, x]

        def product() -> Tensor:
            self.loop.product(*arguments)
            return y

        return product


def products(ggml: Ggml, blocks: int, rows: int, columns: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    """All products of one case, which agree but for the rounding of activations."""
    x = torch.randn(batch, blocks * columns)
    layer = CompactLinear(blocks * columns, blocks * rows, BlockDiagonal(blocks), bias=False)
    prepared = prepare(layer, {"weight": None})
    exact, rounded = convert(prepared), convert(prepared)
    use_int8_activations(rounded)
    weight = exact.weight.detach()
    calls = {"exact": lambda: exact(x), "int8": lambda: rounded(x)}
    calls |= {name: ggml.product(name, weight.view(blocks, rows, columns), x) for name in BYTES}
    for name, call in calls.items():
        error = (call() - calls["exact"]()).norm() / calls["exact"]().norm()
        assert error < LARGEST_ERROR, (name, error)
    return calls


@torch.no_grad()
def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    ggml = Ggml(parser.parse_args().folder)
    lines = []
    for sizes in CASES:
        samples = interleaved(products(ggml, *sizes), SECONDS, time.process_time, warm=True)
        medians = {name: statistics.median(values) for name, values in samples.items()}
        low, _, high = statistics.quantiles(samples["exact"], n=4)
        cells = [
            f"{sizes[0]} × {sizes[1]} × {sizes[2]}, {sizes[3]}",
            f"{medians['exact'] * 1e6:,.0f} ({low * 1e6:,.0f}–{high * 1e6:,.0f})",
            f"{medians['int8'] * 1e6:,.0f}",
        ]
        for name in BYTES:
            cells += [f"{medians[name] * 1e6:,.0f}", f"{medians[name] / medians['exact']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    names = " | ".join(f"{name.upper()}, µs | times longer" for name in BYTES)
    text = TEXT.format(machine=machine(), kernel=kernel(), names=names, lines="---|---|" * len(BYTES))
    RESULTS.write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main()
