"""Random products for an emulated processor, and their errors against float64.

Each product is computed in two divisions into parts, as for one thread and for many, and with prepared bits where there
can be any; all results must be the same bit for bit. A read past the end of what a product is given has no memory to
read. `tests/scripts/native_kernel_cases.py` is the same on a real processor.
"""

import ctypes
import itertools
import math
import random
from pathlib import Path

import torch

from pibinn_plugin.bits import pack_bits

SOURCES = Path(__file__).parents[2] / "pibinn_plugin" / "kernel" / "csrc"
NAMES = ("bits", "words", "input", "output", "bias", "steps", "index", "described", "call", "scratch")
REGIONS = dict.fromkeys(NAMES, 1 << 20)
SCALE = 0.37
# Number in the kernel and, of the sum of magnitudes of an output, rounding in this dtype and of a sum in float32.
DTYPES = {torch.float32: (0, 1e-6), torch.bfloat16: (1, 2**-8 + 1e-6), torch.float16: (2, 2**-11 + 1e-6)}
SAMPLES = (1, 2, 9, 10, 16, 17, 33, 64, 137, 150)


class Problem(ctypes.Structure):
    """As in kernel.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("bits", "bytes", "words", "input", "output", "bias")),
        ("scalar", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("input_stride", "output_stride", "samples")),
        *(("scale", ctypes.c_float), ("transposed", ctypes.c_bool), ("activation_scales", ctypes.c_int64)),
    ]


def content(tensor):
    """The bytes of a tensor."""
    return bytes(tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist())


def result_of(processor, function, problem, parts, output, *more):
    """The bytes of an output, computed part by part, with scratch memory of no more than is asked for."""
    call = processor.place("call", bytes(problem) + content(torch.tensor(parts)))
    arguments = (call, call + ctypes.sizeof(Problem), len(parts))
    scratch = (processor.call(function, *arguments, 0, *more) + 63) // 64 * 64
    garbage = processor.place("scratch", random.randbytes(scratch))
    processor.write(problem.output, content(output))
    processor.call(function, *arguments, garbage, *more)
    return processor.read(problem.output, len(content(output)))


def product(processor, function, divisions, flags, matrix, samples, dtype, transposed, is_int8, words, *more):
    """One product of random inputs: its largest error in units of the allowed one."""
    number, tolerance = DTYPES[dtype]
    matrix = SCALE * (matrix.T if transposed else matrix)
    input = torch.randn(samples, matrix.shape[1]).to(dtype)
    bias = torch.randn(matrix.shape[0]).to(dtype) if samples % 2 else None
    steps = input.float().abs().amax(1, keepdim=True) / 127
    bits, output = pack_bits(flags), torch.full((samples, matrix.shape[0]), torch.nan, dtype=dtype)
    problem = Problem(
        *(processor.place("bits", content(bits)), len(bits), 0),
        *(processor.place("input", content(input)), processor.place("output", content(output))),
        *(0 if bias is None else processor.place("bias", content(bias)), number),
        *(input.shape[1], output.shape[1], samples, SCALE, transposed),
        processor.place("steps", content(steps)) if is_int8 else 0,
    )
    results = []
    places = [0, processor.place("words", random.randbytes(4 * words))] if words else [0]
    for problem.words, parts in itertools.product(places, divisions):
        results.append(result_of(processor, function, problem, parts, output, *more))
    result = results[0]
    assert set(results) == {result}, f"{matrix.shape}, {samples} samples: it depends on the parts or the layout"
    output = torch.frombuffer(bytearray(result), dtype=dtype).view(output.shape).double()
    input = (input.float() * (1 / steps)).round().double() * steps.double() if is_int8 else input.double()
    offset = 0.0 if bias is None else bias.double()
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the spacing of results that small
    allowed = tolerance * (input.abs() @ matrix.abs().T + abs(offset)) + subnormal / 2
    return ((output - (input @ matrix.T + offset)).abs() / allowed).max().item()


def in_blocks(processor, blocks, samples, dtype, transposed, is_int8):
    """A product with random blocks."""
    flags = [torch.rand(sizes) < 0.5 for sizes in blocks]
    matrix = torch.block_diag(*(block.double() * 2 - 1 for block in flags))
    flags = torch.cat([block.flatten() for block in flags])
    divisions = [parts_of(blocks, samples, transposed, *most) for most in ((512, 256), (64, 128))]
    words = 0 if transposed else sum(words_of(*sizes) for sizes in blocks)
    return product(processor, "in_blocks", divisions, flags, matrix, samples, dtype, transposed, is_int8, words)


def words_of(rows, columns):
    """How many words a block is prepared to."""
    return -(-rows // 32) * 32 * -(-columns // 32)


def parts_of(blocks, samples, transposed, most_outputs, most_samples):
    """The parts that `divide` in dispatch.cpp would make, of so many outputs and samples at most."""
    parts, bit, word, row, column = [], 0, 0, 0, 0
    for rows, columns in blocks:
        starts, outputs = ((row, column), columns) if transposed else ((column, row), rows)
        for n in range(0, samples, most_samples):
            for o in range(0, outputs, most_outputs):
                ends = (min(o + most_outputs, outputs), n, min(n + most_samples, samples))
                parts.append([bit, word, rows, columns, *starts, o, *ends])
        bit, word, row, column = bit + rows * columns, word + words_of(rows, columns), row + rows, column + columns
    return parts


def in_rows(processor, rows, columns, samples, dtype, transposed, is_ordered):
    """A product with a random pattern, whose bits are in the order of rows or in another one."""
    pattern = torch.rand(rows, columns) < random.choice((0.01, 0.1, 0.5, 1.0))
    pattern[0, 0] = True
    count = int(pattern.sum())
    places = torch.arange(count) if is_ordered else torch.randperm(count)
    flags = torch.rand(count) < 0.5
    matrix = torch.zeros(rows, columns, dtype=torch.double)
    matrix[pattern] = flags[places].double() * 2 - 1
    index = torch.cat([torch.zeros(1), pattern.sum(1).cumsum(0), pattern.nonzero()[:, 1], places[is_ordered * count :]])
    start = processor.place("index", content(index.int()))
    addresses = [start, start + 4 * (rows + 1), 0 if is_ordered else start + 4 * (rows + 1 + count), rows, columns]
    described = processor.place("described", content(torch.tensor(addresses)))
    middle = rows if transposed else rows // 2
    parts = [[*ends, n, min(n + 32, samples)] for n in range(0, samples, 32) for ends in ((0, middle), (middle, rows))]
    divisions = [[[0, rows, 0, samples]], [part for part in parts if part[0] < part[1]]]
    return product(processor, "in_rows", divisions, flags, matrix, samples, dtype, transposed, False, 0, described)


def in_positions(processor, groups, channels, outputs, images, sizes, kernel, stride, padding, dilation, is_last):
    """A convolution of random images, whose channels may lie side by side: its largest error, likewise."""
    signs = torch.rand(groups * outputs, channels, *kernel) < 0.5
    x, bias = torch.randn(images, groups * channels, *sizes), torch.randn(groups * outputs)
    weight = SCALE * (signs.double() * 2 - 1)
    expected, magnitudes = (
        torch.nn.functional.conv2d(*tensors, stride, padding, dilation, groups)
        for tensors in ((x.double(), weight, bias.double()), (x.double().abs(), weight.abs(), bias.double().abs()))
    )
    stored = x.permute(0, 2, 3, 1) if is_last else x
    strides = torch.empty_like(x, memory_format=torch.channels_last if is_last else torch.contiguous_format).stride()
    axes = zip(sizes, kernel, stride, padding, dilation, expected.shape[2:], strides[2:], strict=True)
    described = [images, channels, *(number for axis in axes for number in axis), *strides[:2], int(is_last)]
    positions, inputs = expected[:, 0].numel(), math.prod(signs.shape[1:])
    bits, output = pack_bits(signs.flatten()), torch.full((expected.numel(),), torch.nan)
    problem = Problem(
        *(processor.place("bits", content(bits)), len(bits), 0),
        *(processor.place("input", content(stored)), processor.place("output", content(output))),
        *(processor.place("bias", content(bias)), 0),
        *(0, groups * outputs, positions, SCALE, False, 0),
    )
    convolution = processor.place("described", content(torch.tensor(described)))
    results = []
    for most_outputs, most_samples in ((512, positions), (64, 13)):
        blocks = [(outputs, inputs)] * groups
        parts = parts_of(blocks, positions, False, most_outputs, most_samples)
        results.append(result_of(processor, "in_positions", problem, parts, output, convolution))
    assert results[0] == results[1], f"{described}: it depends on the parts"
    output = torch.frombuffer(bytearray(results[0]), dtype=torch.float32).double()
    output = (
        output.view(expected.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) if is_last else output.view(expected.shape)
    )
    return ((output - expected).abs() / (DTYPES[torch.float32][1] * magnitudes)).max().item()


def random_convolution():
    """The arguments of `in_positions`."""
    kernel, stride, padding, dilation = (
        [random.randint(*ends) for _ in "hw"] for ends in ((1, 4), (1, 3), (0, 2), (1, 2))
    )
    reaches = zip(kernel, padding, dilation, strict=True)
    sizes = [max(1, gap * (width - 1) + 1 - 2 * pad) + random.randint(0, 20) for width, pad, gap in reaches]
    numbers = random.randint(1, 3), random.randint(1, 9), random.choice((1, 5, 33, 100)), random.randint(1, 3)
    return *numbers, sizes, kernel, stride, padding, dilation, random.random() < 0.5


def run_cases(processor, count=400):
    """Run so many cases of each kind; returns how many products there were and their largest error."""
    random.seed(0)
    torch.manual_seed(0)
    errors = []
    for case in range(count):
        samples, dtype, transposed = random.choice(SAMPLES), random.choice(list(DTYPES)), case % 2 == 0
        sizes = [(random.randint(1, 120), random.randint(1, 120)) for _ in range(random.randint(1, 3))]
        sizes = [(600, 33)] if case == 0 else [(33, 600)] if case == 1 else sizes
        errors.append(in_blocks(processor, sizes, samples, dtype, transposed, not transposed and case % 4 == 1))
        errors.append(in_rows(processor, *sizes[0], samples, dtype, transposed, case % 3 == 0))
        errors.append(in_positions(processor, *random_convolution()))
    return len(errors), max(errors)


def report(count, error):
    """Print the result of `run_cases` and end the program with it."""
    print(f"{count} products, largest error {error:.3f} of the allowed one")
    raise SystemExit(0 if error <= 1.0 else 1)
