"""Products with one-bit weights against float and few-bit products of the same shapes.

``.venv/bin/python benchmarks/products.py`` takes some minutes and writes ``benchmarks/results/products.md``. The peers
of a case and the bound of the processor take turns with the kernel in one process; the table gives medians, the
quartiles of the kernel's time, and ratios.
"""

import ctypes
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compiled_library import compiled_library
from interleaved import Function, interleaved
from products_peers import dense_peers
from torch import Tensor, nn

import pibinn_plugin as pb
from lightning_modules.machine import machine
from pibinn_plugin.functional import kernel
from pibinn_plugin.kernel import native
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import multiply_bits
from pibinn_plugin.packing import PackedSigns, unpack_signs
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.structure.sparse_rows import sparse_rows
from pibinn_plugin.unpack_signs import UnpackSigns, read_from_bits

RESULTS = Path(__file__).parent / "results" / "products.md"
CASES = [
    (64, 512, 512, 1),
    (64, 512, 512, 8),
    (64, 512, 512, 64),
    (64, 256, 128, 512),
    (64, 512, 256, 512),
    (8, 64, 32, 1),
    (8, 512, 512, 1),
    (8, 512, 512, 64),
]
DENSE_ELEMENTS = 2**24  # the largest weight that the dense peers are given
OUT_OF_CACHE = 2**26  # bytes of weights that take turns: twice the last cache of this machine
SECONDS = 4.0  # of a case: as many rounds as fit
COMPILED = {(8, 64, 32, 1), (8, 512, 512, 64)}  # compiling takes longer than all other measurements of a case
PATTERNS = {  # of a 512 × 512 weight
    "mask, 2 %": lambda: pb.Mask(torch.rand(512, 512) < 0.02),
    "mask, 10 %": lambda: pb.Mask(torch.rand(512, 512) < 0.1),
    "mask, 50 %": lambda: pb.Mask(torch.rand(512, 512) < 0.5),
    "band of 11": lambda: pb.Banded(5, 5),
}
LANES = {"portable": 4, "avx2": 8, "avx512": 16}
LOOKUPS = 1_000_000
COLUMNS_IN_MEMORY, COLUMNS_IN_REGISTERS = 32 / 6, {8: 3, 16: 4}  # of a lookup, the latter by lanes

NOTES = (
    "Exact float32 products, called as operators from Python, with bits that were laid out before as layers keep them,",
    "warm: each turn begins with a product that is not timed. The bound is what one core does in a loop of lookups and",
    "additions alone, from the first cache or (batches below a vector) from registers. The columns after it are peers",
    "on the same shapes: how many times longer they take than the kernel, medians of interleaved runs. `torch.bmm` has",
    "its weight in the layout that is fastest for it, and its input cut into blocks beforehand. Dense peers run where",
    "the dense weight fits. The bound counts neither finding an entry nor building the tables. Times are those of the",
    "processor, so that other work on it counts little; for two threads, those of a clock.",
)
NOTES_ON_CACHES = (
    "The same products with the same weight again, in the caches (warm), and with copies of the weight in turns, which",
    "take 64 MiB or more together and come from memory each time. Stored bits are staged by each product, as in",
    "compiled code and by `functional.packed_linear`. The columns after the kernel's say how many times longer these",
    "take than it, with the same state of the caches.",
)
NOTES_ON_PATTERNS = (
    "Masks and bands of 512 × 512, as packed layers. The index is what the kernel reads beside the bits; it is derived",
    "from the structure. The columns after it say how many times longer than the layer these take: its adjoint, the",
    "reference in plain torch operations, `F.linear` with a dense float32 weight that has the structure in it, and the",
    "same weight as a sparse CSR matrix, with its input transposed beforehand.",
)


class BlockProduct(nn.Module):
    """What one would write in float: ``torch.bmm`` over the blocks, here with the weight as it is fastest."""

    def __init__(self, blocks: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, columns, rows))

    def forward(self, x: Tensor) -> Tensor:
        blocks, columns, _ = self.weight.shape
        return torch.bmm(x.view(-1, blocks, columns).transpose(0, 1), self.weight).transpose(0, 1).flatten(1)


def packed_layer(packed: PackedSigns) -> Any:
    """A compact layer that multiplies these signs, with λ = 0.5."""
    layer = CompactLinear(packed.shape[1], packed.shape[0], packed.structure, bias=False)
    read_from_bits(layer, "weight", UnpackSigns(GlobalScale(0.5), packed, True, torch.float32), packed.bits)
    multiply_bits(layer)
    return layer


class Case:
    """A weight of equal blocks, its packed layer, and an input."""

    def __init__(self, blocks: int, rows: int, columns: int, batch: int) -> None:
        self.sizes, self.batch, self.macs = (blocks, rows, columns), batch, blocks * rows * columns * batch
        self.shape = (blocks * rows, blocks * columns)
        self.structure = pb.BlockDiagonal(blocks)
        bits = torch.randint(256, (-(-blocks * rows * columns // 8),), dtype=torch.uint8)
        self.packed = PackedSigns(bits, self.structure, self.shape)
        self.layer = packed_layer(self.packed)
        words = native.prepare(bits, (rows, columns), self.packed.nnz)
        self.words = bits if words is None else words
        self.x = torch.randn(batch, blocks * columns)

    def kernel(self) -> Tensor:
        """The operator, as called from Python and as a layer calls it."""
        return self.multiply(self.words)

    def multiply(self, bits: Tensor) -> Tensor:
        """The operator, for bits as they are stored or as they were laid out."""
        _, rows, columns = self.sizes
        return torch.ops.pibinn.packed_linear.default(self.x, bits, self.layer._rule.scale.value, rows, columns)

    def plain(self, x: Tensor) -> Tensor:
        """The reference in torch operations."""
        signs = unpack_signs(self.packed.bits, self.structure.compact_shape(self.shape), x.dtype)
        return self.structure.linear(x, signs, self.shape) * self.layer._rule.scale.value

    def products(self) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
        """The kernel, on stored bits too, and what one would write in float: each a function of a weight, and that."""
        blocks, rows, columns = self.sizes
        parts, weight = self.x.view(-1, blocks, columns).transpose(0, 1), torch.randn(blocks, columns, rows)
        half_parts = parts.bfloat16()
        return {
            "kernel": (self.multiply, self.words),
            "stored bits": (self.multiply, self.packed.bits),
            "bmm fp32": (lambda weight: torch.bmm(parts, weight), weight),
            "bmm bf16": (lambda weight: torch.bmm(half_parts, weight), weight.bfloat16()),
        }

    def functions(self) -> dict[str, Function]:
        """The kernel and its peers."""
        functions = warm(self.products()) | {"plain torch": lambda: self.plain(self.x)}
        if (*self.sizes, self.batch) in COMPILED:
            compiled = torch.compile(self.plain, fullgraph=True)
            functions["plain compiled"] = lambda: compiled(self.x)
        if self.shape[0] * self.shape[1] <= DENSE_ELEMENTS:
            functions |= dense_peers(self.packed.weight(torch.tensor([0.5]), False, torch.float32), self.x, self.sizes)
        return functions


def warm(products: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]) -> dict[str, Function]:
    """Each product with the same weight again."""
    return {name: partial(product, weight) for name, (product, weight) in products.items()}


def in_turns(products: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]) -> dict[str, Function]:
    """Each product with one copy of its weight after the other, more of them than the caches hold."""

    def next_product(product: Callable[[Tensor], Tensor], weights: Iterator[Tensor]) -> Tensor:
        return product(next(weights))

    functions: dict[str, Function] = {}
    for name, (product, weight) in products.items():
        copies = [weight.clone() for _ in range(max(2, -(-OUT_OF_CACHE // weight.nbytes)))]
        functions[name] = partial(next_product, product, itertools.cycle(copies))
    return functions


class PatternCase:
    """A weight of any pattern, its packed layer, and an input."""

    def __init__(self, structure: pb.Structure, batch: int) -> None:
        self.structure, self.shape = structure, (512, 512)
        self.packed = PackedSigns.pack(torch.randn(self.shape), structure, self.shape)
        self.layer = packed_layer(self.packed)
        self.x, self.macs = torch.randn(batch, 512), batch * self.packed.nnz

    def functions(self) -> dict[str, Function]:
        """The layer, its adjoint and its peers."""
        weight = self.packed.weight(torch.tensor([0.5]), False, torch.float32)
        sparse, columns = weight.to_sparse_csr(), self.x.T.contiguous()
        return {
            "layer": lambda: self.layer(self.x),
            "adjoint": lambda: self.layer.adjoint(self.x),
            "plain torch": lambda: self.structure.linear(self.x, self.packed.signs(), self.shape) * 0.5,
            "F.linear fp32": lambda: F.linear(self.x, weight),
            "sparse CSR": lambda: sparse @ columns,
        }


class IssueBound:
    """Loops that do nothing but look up and add: what one core can do at most, in the cache or in registers."""

    def __init__(self) -> None:
        self.lanes = LANES[kernel()]
        flags = {4: "-msse2", 8: "-mavx2", 16: "-mavx512f"}[self.lanes]
        self.loops = compiled_library("issue_bound.cpp", f"-DLANES={self.lanes}", flags)
        for loop in (self.loops.lookups_in_memory, self.loops.lookups_in_registers):
            loop.argtypes, loop.restype = [ctypes.c_long], None

    def loop(self, batch: int) -> tuple[Function, float]:
        """A loop, and the multiply-adds that one call of it stands for."""
        if batch >= self.lanes or self.lanes == 4:
            return lambda: self.loops.lookups_in_memory(LOOKUPS), LOOKUPS * self.lanes * COLUMNS_IN_MEMORY
        return lambda: self.loops.lookups_in_registers(LOOKUPS), LOOKUPS * self.lanes * COLUMNS_IN_REGISTERS[self.lanes]


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = torch.randn(2, 2**25)
    samples = interleaved({"copy": lambda: target.copy_(source)}, SECONDS)["copy"]
    return 2 * 4 * 2**25 / statistics.median(samples)


def table_of_products() -> list[str]:
    """One row a case: the kernel, then how many times longer each peer takes."""
    issue_bound, rows, names = IssueBound(), [], []
    for sizes in CASES:
        case = Case(*sizes)
        loop, macs_of_loop = issue_bound.loop(case.batch)
        samples = interleaved({**case.functions(), "bound": loop}, SECONDS, time.process_time, warm=True)
        medians = {name: statistics.median(values) for name, values in samples.items()}
        low, _, high = statistics.quantiles(samples["kernel"], n=4)
        rate, bound = case.macs / medians["kernel"], macs_of_loop / medians.pop("bound")
        first = [
            f"{sizes[0]} × {sizes[1]} × {sizes[2]}, {sizes[3]}",
            f"{medians['kernel'] * 1e6:,.1f} ({low * 1e6:,.1f}–{high * 1e6:,.1f})",
            f"{rate / 1e9:.1f}",
            f"{case.packed.bits.numel():,}",
            f"{bound / 1e9:.1f}",
            f"{100 * rate / bound:.0f} %",
        ]
        rows.append((first, {name: medians[name] / medians["kernel"] for name in medians if name != "kernel"}))
        names += [name for name in rows[-1][1] if name not in names]
    header = [
        "blocks × rows × columns, batch",
        "kernel, µs (quartiles)",
        "GMAC/s",
        "weight bytes",
        "bound, GMAC/s",
        "share",
    ]
    lines = ["| " + " | ".join([*header, *names]) + " |", "|" + "---|" * len([*header, *names])]
    for first, ratios in rows:
        cells = [f"{ratios[name]:.1f}" if name in ratios else "–" for name in names]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return lines


def table_of_caches() -> list[str]:
    """One row a case: the kernel and its float peers with weights in the caches and with weights from memory."""
    names = ["stored bits", "bmm fp32", "bmm bf16"]
    header = ["blocks × rows × columns, batch", *(f"kernel, µs, {caches}" for caches in ("warm", "in turns"))]
    header += [f"{name}, {caches}" for name in names for caches in ("warm", "in turns")]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for *sizes, batch in CASES:
        if batch > 64:  # which hide the weights behind the work
            continue
        products = Case(*sizes, batch).products()
        medians = []
        for functions, is_warm in ((warm(products), True), (in_turns(products), False)):
            samples = interleaved(functions, SECONDS / 2, time.process_time, warm=is_warm)
            medians.append({name: statistics.median(values) for name, values in samples.items()})
        cells = [" × ".join(map(str, sizes)) + f", {batch}", *(f"{each['kernel'] * 1e6:,.1f}" for each in medians)]
        cells += [f"{each[name] / each['kernel']:.2f}" for name in names for each in medians]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_of_patterns() -> list[str]:
    """One row a pattern and batch: the layer, then how many times longer its adjoint and each peer take."""
    lines: list[str] = []
    for (name, structure), batch in itertools.product(PATTERNS.items(), (1, 64)):
        case = PatternCase(structure(), batch)
        samples = interleaved(case.functions(), SECONDS, time.process_time)
        medians = {peer: statistics.median(values) for peer, values in samples.items()}
        low, time_of_layer, high = statistics.quantiles(samples["layer"], n=4)
        index = sparse_rows(case.structure, case.shape)
        peers = [peer for peer in medians if peer != "layer"]
        if not lines:
            header = ["pattern, batch", "layer, µs (quartiles)", "GMAC/s", "weight bytes", "index bytes", *peers]
            lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        cells = [
            f"{name}, {batch}",
            f"{time_of_layer * 1e6:,.1f} ({low * 1e6:,.1f}–{high * 1e6:,.1f})",
            f"{case.macs / time_of_layer / 1e9:.1f}",
            f"{case.packed.bits.numel():,}",
            f"{0 if index is None else index.nbytes:,}",
            *(f"{medians[peer] / time_of_layer:.1f}" for peer in peers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_of_other_bars() -> list[str]:
    """The layer as a module, shapes that fit no vector, and two threads."""
    lines = ["| what | median ratio |", "|---|---|"]
    small, product = Case(8, 64, 32, 1), BlockProduct(8, 64, 32)
    samples = interleaved(
        {"layer": lambda: small.layer(small.x), "bmm": lambda: product(small.x)}, SECONDS, time.process_time
    )
    lines.append(
        f"| 8 × 64 × 32, batch 1, as modules: bmm fp32 / packed layer | {_ratio(samples, 'bmm', 'layer'):.2f} |"
    )
    for batch in (1, 64):
        odd, even = Case(7, 250, 333, batch), Case(7, 256, 352, batch)
        samples = interleaved({"odd": odd.kernel, "even": even.kernel}, SECONDS, time.process_time)
        ratio = _ratio(samples, "even", "odd") * odd.macs / even.macs
        lines.append(f"| 7 × 250 × 333, batch {batch}: its rate / that of 7 × 256 × 352 | {ratio:.2f} |")
    if os.getloadavg()[0] > 1.5:  # of which the measurement itself is one
        return [*lines, "| two threads | not measured: other work has the cores |"]
    for sizes in ((64, 512, 512, 1), (64, 512, 512, 64), (64, 512, 256, 512)):
        name = f"{sizes[0]} × {sizes[1]} × {sizes[2]}, batch {sizes[3]}"
        lines.append(f"| {name}: one thread / two threads | {speedup_of_two_threads(Case(*sizes)):.2f} |")
    return lines


def speedup_of_two_threads(case: Case) -> float:
    """One thread's time over that of two. Changing the number makes new threads, which is not what is measured."""
    samples: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(15):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(3):
                case.kernel()
            start = time.perf_counter()
            for _ in range(5):
                case.kernel()
            samples[str(threads)].append(time.perf_counter() - start)
    torch.set_num_threads(1)
    return _ratio(samples, "1", "2")


def _ratio(samples: dict[str, list[float]], numerator: str, denominator: str) -> float:
    return statistics.median(samples[numerator]) / statistics.median(samples[denominator])


def main() -> None:
    """Measure and write the tables."""
    torch.set_num_threads(1)
    with torch.no_grad():
        bandwidth, products, caches = copy_bandwidth(), table_of_products(), table_of_caches()
        patterns, others = table_of_patterns(), table_of_other_bars()
    lines = [
        "# Products with one-bit weights",
        "",
        f"Written by `benchmarks/products.py`. {machine()} Path of the kernel: {kernel()}.",
        "",
        *NOTES,
        f"A copy moves {bandwidth / 1e9:.1f} GB/s; load average of the machine at the end: {os.getloadavg()[0]:.1f}.",
        "",
        *products,
        "",
        *NOTES_ON_CACHES,
        "",
        *caches,
        "",
        *NOTES_ON_PATTERNS,
        "",
        *patterns,
        "",
        *others,
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
