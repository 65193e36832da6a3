"""Products with one-bit weights on a CUDA device, against cuBLAS and torchao on the same shapes.

``python benchmarks/cuda_products.py`` takes about a minute and writes ``benchmarks/results/cuda_products.md``. With
``--variants`` it times the tiles that `cuda.choose_tile` can choose among, and writes nothing.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pibinn_plugin.kernel import cuda
from pibinn_plugin.kernel.cuda import Tile
from pibinn_plugin.packing import unpack_signs

RESULTS = Path(__file__).parent / "results" / "cuda_products.md"
SIZES = [(64, 2048, 2048), (64, 512, 512), (1, 4096, 4096), (1, 8192, 8192)]
BATCHES = (1, 16, 256)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OUT_OF_CACHE = 2**27  # bytes of weights that take turns: more than twice the last cache of an H100
MILLISECONDS = 10.0  # of a sample
SAMPLES = 5

NOTES = (
    "Medians of replayed CUDA graphs, in µs a product. In turns: with copies of the weight that take 128 MiB or more",
    "together and come from memory; warm: with the same weight again. Share: the time that the packed bytes would take",
    "at the bandwidth of the copy, of that of a product in turns. The columns after it say how many times longer these",
    "take, in turns: `torch.bmm` or `F.linear` in the activations' dtype, without TF32, with its input cut into blocks",
    "beforehand and its weight in the faster of two layouts; and a dense layer with torchao's int4 weights. Each",
    "packed product was compared with float64 before it was timed.",
)

# Width, height, inputs, slots, warps, stages. A float32 sample has four slots at least.
FEW = [(128, 4, 3), (128, 4, 2), (128, 4, 4), (64, 4, 3), (64, 2, 3), (32, 2, 3), (32, 1, 3), (256, 8, 3), (128, 8, 3)]
VARIANTS: dict[tuple[int, torch.dtype], list[Tile]] = {
    (1, torch.float32): [Tile(1, height, 512, 8, warps, stages) for height, warps, stages in FEW],
    (1, torch.bfloat16): [Tile(1, height, 512, 8, warps, stages) for height, warps, stages in FEW],
    (16, torch.float32): [
        Tile(16, 64, 512, 4, 4, 2),
        Tile(16, 128, 512, 4, 8, 2),
        Tile(8, 128, 512, 4, 4, 2),
        Tile(16, 64, 64, 0, 4, 3),
        Tile(16, 128, 64, 0, 4, 3),
        Tile(16, 128, 128, 0, 4, 3),
        Tile(16, 128, 128, 0, 8, 3),
    ],
    (16, torch.bfloat16): [
        Tile(8, 128, 512, 1, 4, 3),
        Tile(16, 64, 512, 1, 2, 2),
        Tile(16, 64, 512, 1, 4, 2),
        Tile(16, 128, 512, 1, 4, 2),
        Tile(16, 128, 512, 1, 4, 3),
        Tile(16, 128, 512, 1, 8, 2),
        Tile(16, 64, 64, 0, 4, 4),
        Tile(16, 128, 64, 0, 4, 3),
        Tile(16, 128, 128, 0, 4, 3),
        Tile(16, 128, 128, 0, 8, 3),
    ],
    (256, torch.float32): [
        Tile(32, 128, 64, 0, 4, 3),
        Tile(64, 128, 64, 0, 4, 3),
        Tile(64, 256, 64, 0, 8, 3),
        Tile(128, 128, 64, 0, 8, 3),
        Tile(128, 128, 32, 0, 8, 3),
    ],
    (256, torch.bfloat16): [
        Tile(64, 128, 64, 0, 4, 3),
        Tile(64, 128, 128, 0, 4, 3),
        Tile(128, 128, 64, 0, 4, 3),
        Tile(128, 128, 64, 0, 8, 3),
        Tile(128, 128, 128, 0, 8, 3),
        Tile(128, 256, 64, 0, 8, 3),
        Tile(256, 128, 64, 0, 8, 3),
    ],
}

Products = list[Callable[[], object]]


def microseconds(products: Products) -> float:
    """The median time of one of these calls, which take turns in a CUDA graph."""
    products[0]()  # compiles
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), -(-8 // len(products)) * products
    with torch.cuda.graph(graph):
        for product in calls:
            product()
    replays = max(1, int(MILLISECONDS / max(_elapsed(graph, 2) / 2, 1e-3)))
    return statistics.median(1e3 * _elapsed(graph, replays) / replays / len(calls) for _ in range(SAMPLES))


def _elapsed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copies(weight: Tensor) -> list[Tensor]:
    """The weight, and so many copies that they do not fit into the caches."""
    return [weight, *(weight.clone() for _ in range(max(1, -(-OUT_OF_CACHE // weight.nbytes) - 1)))]


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)]) * 1e6


class Case:
    """A weight of equal blocks, in bits and in float64."""

    def __init__(self, blocks: int, rows: int, columns: int) -> None:
        self.blocks, self.rows, self.columns = blocks, rows, columns
        self.bits = torch.randint(256, (blocks * rows * columns // 8,), dtype=torch.uint8, device="cuda")
        self.copies = copies(self.bits)
        self.scale = torch.full((1,), 0.5, device="cuda")

    def input(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Samples, which depend on the batch alone."""
        torch.manual_seed(batch)
        return torch.randn(batch, self.blocks * self.columns, device="cuda").to(dtype)

    def packed(self, x: Tensor, tile: Tile | None = None) -> Products:
        """The packed product, with each copy of the bits."""

        def product(bits: Tensor) -> Tensor:
            return cuda.multiply(x, bits, self.rows, self.columns, False, self.scale, tile=tile)

        return [lambda bits=bits: product(bits) for bits in self.copies]

    def error(self, x: Tensor, y: Tensor) -> float:
        """The largest error of a product, in units of what rounding may make of it."""
        signs, worst = unpack_signs(self.bits, (self.blocks, self.rows, self.columns), torch.int8), 0.0
        parts = x.view(len(x), self.blocks, self.columns).double()
        for block, result in enumerate(y.view(len(x), self.blocks, self.rows).unbind(1)):
            if block % 8 and self.blocks > 1:  # one in eight
                continue
            expected = 0.5 * parts[:, block] @ signs[block].double().T
            norm = parts[:, block].norm(dim=-1).amax().item()
            allowed = 4 * 2.0**-24 * self.columns**0.5 * norm + 2 * ROUNDING[x.dtype] * expected.abs()
            worst = max(worst, ((result.double() - expected).abs() / allowed).amax().item())
        return worst

    def cublas(self, x: Tensor) -> Iterator[Products]:
        """The float product, with the weight in one layout and in another."""
        if self.blocks == 1:
            weights = copies(torch.randn(self.rows, self.columns, device="cuda").to(x.dtype))
            yield [lambda weight=weight: F.linear(x, weight) for weight in weights]
            return
        parts = x.view(-1, self.blocks, self.columns).transpose(0, 1).contiguous()
        weights = copies(torch.randn(self.blocks, self.columns, self.rows, device="cuda").to(x.dtype))
        yield [lambda weight=weight: torch.bmm(parts, weight) for weight in weights]
        weights = [weight.view(self.blocks, self.rows, self.columns).mT for weight in weights]
        yield [lambda weight=weight: torch.bmm(parts, weight) for weight in weights]

    def torchao(self, x: Tensor) -> Products:
        """Dense layers with weights of four bits; none where torchao has none for this machine."""
        if self.blocks > 1 or x.dtype != torch.bfloat16:
            return []
        try:
            from torchao.quantization import Int4WeightOnlyConfig, quantize_

            layers = []
            for _ in range(max(2, OUT_OF_CACHE * 2 // (self.rows * self.columns))):
                layer = nn.Sequential(nn.Linear(self.columns, self.rows, bias=False, device="cuda", dtype=x.dtype))
                quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
                layers.append(layer)
            layers[0](x)
        except Exception as error:
            print(f"torchao int4: {type(error).__name__}: {str(error)[:200]}")
            return []
        return [lambda layer=layer: layer(x) for layer in layers]


def table(copied: float) -> list[str]:
    """One row a case."""
    header = ["blocks × rows × columns", "batch", "activations", "in turns, µs", "warm, µs", "packed bytes", "share"]
    header += ["cuBLAS", "torchao int4"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for sizes in SIZES:
        case = Case(*sizes)
        for batch in BATCHES:
            for dtype, name in DTYPES.items():
                x = case.input(batch, dtype)
                packed = case.packed(x)
                error = case.error(x, packed[0]())
                if not error <= 1:
                    raise ValueError(f"{sizes}, batch {batch}, {name}: the error is {error:.1f} times what it may be")
                in_turns, warm = microseconds(packed), microseconds(packed[:1])
                floats = min(microseconds(products) for products in case.cublas(x))
                int4 = case.torchao(x)
                cells = [" × ".join(map(str, sizes)), str(batch), name, f"{in_turns:,.1f}", f"{warm:,.1f}"]
                cells += [f"{case.bits.nbytes:,}", f"{1e8 * case.bits.nbytes / copied / in_turns:.0f} %"]
                cells += [f"{floats / in_turns:.1f}", f"{microseconds(int4) / in_turns:.1f}" if int4 else "–"]
                lines.append("| " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
                torch.cuda.empty_cache()
    return lines


def time_variants() -> None:
    """Print the time of every tile for every case, and the best."""
    for sizes in SIZES:
        case = Case(*sizes)
        for (batch, dtype), tiles in VARIANTS.items():
            x, times = case.input(batch, dtype), {}
            chosen = cuda.choose_tile(batch, case.rows, case.blocks, dtype, False)
            for tile in dict.fromkeys([chosen, *tiles]):
                try:
                    packed = case.packed(x, tile)
                    error = case.error(x, packed[0]())
                    times[tile] = microseconds(packed) if error <= 1 else float("inf")
                    print(f"{times[tile]:9.1f} µs  error {error:.2f}  {tuple(tile)}", flush=True)
                except Exception as error:  # a tile that does not fit into the shared memory, say
                    print(f"{type(error).__name__}: {str(error)[:120]}  {tuple(tile)}", flush=True)
            best = min(times, key=lambda tile, times=times: times[tile])
            print(f"{sizes}, batch {batch}, {DTYPES[dtype]}: best {tuple(best)}, chosen {tuple(chosen)}\n", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true")
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        if parser.parse_args().variants:
            time_variants()
            return
        copied = bandwidth()
        lines = [
            "# Products with one-bit weights on a CUDA device",
            "",
            f"Written by `benchmarks/cuda_products.py` on {torch.cuda.get_device_name()}, torch {torch.__version__}, "
            f"Triton {cuda.triton.__version__}. A copy moves {copied / 1e9:,.0f} GB/s.",
            "",
            *NOTES,
            "",
            *table(copied),
        ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
