"""Products of one path of the native kernel against float64, in memory that ends where the tensors end.

``PIBINN_KERNEL=avx2 python native_kernel_cases.py`` prints the path and the largest error in units of the allowed one;
a read past the end of the bits or of the input is a segmentation fault.
"""

import ctypes
import itertools
import mmap
import random

import torch

from pibinn_plugin.bits import pack_bits
from pibinn_plugin.functional import kernel

# Of the sum of magnitudes of an output: the rounding of the result in this dtype, and of a sum in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8 + 1e-6, torch.float16: 2**-11 + 1e-6}
SIZES = [
    (1, 1, 1),
    (2, 3, 5),
    (8, 64, 32),
    (3, 33, 70),
    (1, 250, 333),
    (1, 600, 40),
    (1, 40, 600),
    (5, 8, 8),
    (1, 97, 64),
]
SAMPLES = (1, 6, 7, 13, 33)
DENSITIES = (0.005, 0.05, 0.3, 1.0)


class GuardedMemory:
    """Memory whose last byte is followed by a page that nobody may read."""

    def __init__(self, size):
        page = mmap.PAGESIZE
        self.size = -(-size // page) * page
        self.memory = mmap.mmap(-1, self.size + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + self.size), ctypes.c_size_t(page), 0) == 0

    def copy(self, tensor):
        """The tensor, its last element at the end."""
        if tensor.numel() == 0:
            return tensor
        count = tensor.numel()
        start = self.size - count * tensor.element_size()
        flat = torch.frombuffer(self.memory, dtype=tensor.dtype, count=count, offset=start)
        return flat.copy_(tensor.flatten()).view(tensor.shape)


def random_weight(memory, blocks):
    """Random signs: their matrix, their bits, and the overload and the sizes that operators take for them."""
    signs = [torch.randint(0, 2, sizes) * 2 - 1 for sizes in blocks]
    rows, columns = ([sizes[i] for sizes in blocks] for i in (0, 1))
    matrix = torch.block_diag(*(block.double() for block in signs)) if all(rows + columns) else _with_empty(signs)
    bits = memory.copy(pack_bits(torch.cat([block.flatten() for block in signs]) > 0))
    is_even = len(set(blocks)) == 1 and all(blocks[0])
    return matrix, bits, *(("default", blocks[0]) if is_even else ("uneven", (rows, columns)))


def random_sparse_weight(memory, rows, columns, density, is_ordered):
    """Random signs of a random pattern, their bits by row or in random order, and what operators take for them."""
    pattern = torch.rand(rows, columns) < density
    pattern[random.randrange(rows), random.randrange(columns)] = True
    count = int(pattern.sum())
    places = torch.arange(count) if is_ordered else torch.randperm(count)
    flags = torch.randint(0, 2, (count,)) > 0
    matrix = torch.zeros(rows, columns, dtype=torch.double)
    matrix[pattern] = flags[places].double() * 2 - 1
    starts = torch.cat([torch.zeros(1), pattern.sum(1).cumsum(0)])
    parts = [starts, pattern.nonzero()[:, 1]] + ([] if is_ordered else [places])
    index = memory[2].copy(torch.cat(parts).int())
    return matrix, memory[0].copy(pack_bits(flags)), "sparse", (index, [rows, columns])


def random_input(memory, samples, inputs, dtype, strided):
    """Random samples, side by side in memory or each behind as many other values."""
    input = torch.randn(samples, 2 * inputs if strided else inputs).to(dtype)
    return memory.copy(input)[:, -inputs:]


def error(memory, weight, samples, dtype, transposed, strided):
    """One random product, with and without a bias; its error in units of the allowed one."""
    matrix, bits, overload, sizes = weight
    matrix = 0.37 * (matrix.T if transposed else matrix)
    outputs, inputs = matrix.shape
    input = random_input(memory[1], samples, inputs, dtype, strided)
    bias = torch.randn(outputs).to(dtype) if samples % 2 else None
    operator = getattr(torch.ops.pibinn.packed_linear, overload)
    output = operator(input, bits, torch.tensor([0.37]), *sizes, bias, transposed)
    assert output.dtype == dtype
    if overload != "sparse" and not transposed:
        words = memory[3].copy(torch.ops.pibinn.prepare(bits, *as_lists(sizes, outputs)))
        assert torch.equal(operator(input, words, torch.tensor([0.37]), *sizes, bias), output)
    offset = 0.0 if bias is None else bias.double()
    expected = input.double() @ matrix.T + offset
    magnitude = input.double().abs() @ matrix.abs().T + abs(offset) + 1e-30
    return ((output.double() - expected).abs() / magnitude).max().item() / TOLERANCE[dtype]


def as_lists(sizes, outputs):
    """The rows and the columns of each block."""
    return sizes if isinstance(sizes[0], list) else [[size] * (outputs // sizes[0]) for size in sizes]


def check_int8(memory, blocks, samples, dtype, strided):
    """One random product with int8 activations, whose integers are to be exact: bit for bit, where there is no bias."""
    matrix, bits, overload, sizes = random_weight(memory[0], blocks)
    outputs, inputs = matrix.shape
    input = random_input(memory[1], samples, inputs, dtype, strided)
    # No one scale, and none that is too small: the least it may be is the largest input over 127.
    scales = input.float().abs().amax(1, keepdim=True) / 127 * torch.tensor([1.0, 1.5]).repeat(samples)[:samples, None]
    integers = (input.float() * (1 / scales)).round().long()
    assert integers.abs().max() <= 127
    expected = (integers @ matrix.long().T).float() * (torch.tensor([0.37]) * scales)
    operator, scale = getattr(torch.ops.pibinn.packed_linear_int8, overload), torch.tensor([0.37])
    assert torch.equal(operator(input, bits, scale, scales, *sizes), expected.to(dtype))
    bias = torch.randn(outputs).to(dtype)
    output = operator(input, bits, scale, scales, *sizes, bias)
    allowed = TOLERANCE[dtype] * (expected.abs() + bias.float().abs())
    assert ((output.float() - (expected + bias.float())).abs() <= allowed).all()


def _with_empty(signs):
    """``torch.block_diag`` drops what blocks without rows or without columns are to keep."""
    matrix = torch.zeros(sum(len(block) for block in signs), sum(block.shape[1] for block in signs), dtype=torch.double)
    row = column = 0
    for block in signs:
        matrix[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return matrix


def main():
    """Run every case and print the result."""
    random.seed(0)
    torch.manual_seed(0)
    memory, worst = [GuardedMemory(1 << size) for size in (17, 20, 19, 18)], 0.0
    for (count, *sizes), samples, transposed in itertools.product(SIZES, SAMPLES, (False, True)):
        weight = random_weight(memory[0], [tuple(sizes)] * count)
        worst = max(worst, error(memory, weight, samples, torch.float32, transposed, False))
        check_int8(memory, [tuple(sizes)] * count, samples, torch.float32, False)
    for _ in range(80):
        blocks = [(random.randint(0, 99), random.randint(0, 99)) for _ in range(random.randint(1, 4))] + [(3, 2)]
        dtype, transposed, strided = random.choice(list(TOLERANCE)), random.random() < 0.5, random.random() < 0.5
        weight = random_weight(memory[0], blocks)
        worst = max(worst, error(memory, weight, random.choice(SAMPLES), dtype, transposed, strided))
        check_int8(memory, blocks, random.choice(SAMPLES), dtype, strided)
    for _ in range(160):
        rows, columns, density = random.randint(1, 200), random.randint(1, 200), random.choice(DENSITIES)
        dtype, transposed, strided = random.choice(list(TOLERANCE)), random.random() < 0.5, random.random() < 0.5
        weight = random_sparse_weight(memory, rows, columns, density, random.random() < 0.5)
        worst = max(worst, error(memory, weight, random.choice(SAMPLES), dtype, transposed, strided))
    for samples, transposed in itertools.product(SAMPLES, (False, True)):
        weight = random_weight(memory[0], [(40, 0), (0, 7), (3, 2)])  # outputs without inputs, and the reverse
        worst = max(worst, error(memory, weight, samples, torch.float32, transposed, False))
    print(kernel(), f"{worst:.3f}")


if __name__ == "__main__":
    main()
