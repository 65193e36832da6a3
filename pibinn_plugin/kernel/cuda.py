"""The backend for CUDA devices: the products of equal blocks, in Triton, on bits as they are stored.

Tensor cores multiply signs, which are unpacked in registers and never written to memory. Signs are exact in 16 bits and
so are activations of 16 bits; one of 32 bits is the exact sum of three bfloat16 numbers, which take turns. Sums are
float32. Everything else that a packed layer does on a CUDA device is plain torch.

A product of few samples can take as long as its bits take to come from memory, if a sign takes no more than two
instructions in all. It does: two signs that lie 16 bits apart come out of a word with one shift and one logical
operation, and no thread needs those of another one where columns are added in the order in which threads hold them.
For many samples the activations count, and columns stay in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of an int32 word, and of two signs in one: the activations' -1 twice, by which a set bit makes +1 of the sign bit.
_MINUS_ONES = {
    torch.float32: 0xBF80BF80 - 2**32,
    torch.bfloat16: 0xBF80BF80 - 2**32,
    torch.float16: 0xBC00BC00 - 2**32,
}
_PROGRAMS = 256  # of large tiles at least, where there are as many outputs: two for nearly each processor of an H100
_FEW_SAMPLES = 8  # at most, for which the bits count
_FEW_INPUTS = 512  # of a step for few samples: 16 words, four for each of the four threads that share a row


class Tile(NamedTuple):
    """What one program multiplies in one step, and how it runs.

    With slots, for few samples, the columns of the right-hand factor are the terms of each sample, and zeros up to the
    8 columns that the hardware needs. Without, each term has a product of its own.
    """

    samples: int
    outputs: int
    inputs: int
    slots: int
    warps: int
    stages: int


def choose_tile(samples: int, outputs: int, blocks: int, dtype: torch.dtype, transposed: bool) -> Tile:
    """The tile for a product of few samples, or of many; smaller ones where there are too few to go round.

    As measured on an H100 by ``benchmarks/cuda_products.py --variants``.
    """
    is_float32 = dtype == torch.float32
    if transposed or samples > _FEW_SAMPLES:
        width = min(max(16, triton.next_power_of_2(samples)), 64 if is_float32 else 128)
        if outputs <= 64 or blocks * triton.cdiv(outputs, 128) * triton.cdiv(samples, width) < _PROGRAMS:
            return Tile(width, 64, 64, 0, 4, 3)
        is_narrow = width == 16 and not transposed
        return Tile(width, 128, 128 if is_narrow else 64, 0, 4 if is_float32 else 8, 3)
    width = triton.next_power_of_2(samples)
    slots = max(8 // width, 4 if is_float32 else 1)
    for height, warps, stages in ((128, 4, 2), (64, 4, 3), (32, 2, 3)):
        if 128 * blocks * triton.cdiv(outputs, height) >= height * _PROGRAMS:
            return Tile(width, height, _FEW_INPUTS, slots, warps, stages)
    return Tile(width, 16, _FEW_INPUTS, slots, 1, 3)


@triton.jit
def _load_words(
    bits: tl.tensor,
    row: tl.tensor,
    word: tl.tensor,
    columns: tl.tensor,
    end: tl.tensor,
    mask: tl.tensor,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """The words of 32 bits at these places of rows (a column, int64) of so many columns, of ``end`` bytes.

    Rows start at words, whose number is a multiple of ``UNIT``; or anywhere, if that is 0.
    """
    if UNIT > 0:
        words = bits.to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.load(words + row * (columns // (32 * UNIT) * UNIT) + word, mask=mask, other=0)
    start = row * columns + word * 32
    shift = (start & 7).to(tl.int32)
    byte = start >> 3
    words = tl.load(bits + byte, mask=mask, other=0).to(tl.uint32)
    for i in tl.static_range(1, 4):
        words |= tl.load(bits + byte + i, mask=mask & (byte + i < end), other=0).to(tl.uint32) << (8 * i)
    rest = tl.load(bits + byte + 4, mask=mask & (byte + 4 < end), other=0).to(tl.uint32)
    return ((words >> shift) | ((rest << 1) << (31 - shift))).to(tl.int32, bitcast=True)


@triton.jit
def _signs(words: tl.tensor, minus_ones: tl.tensor, dtype: tl.constexpr, ORDERED: tl.constexpr) -> tl.tensor:
    """The signs of (rows, words), of shape (rows, words, 16, 2) and 16 bits: two at a time, as halves of one word.

    Ordered, the last axes are the columns of a word. Else a column is 16 times the last axis and the one before it.
    """
    place = tl.arange(0, 16)[None, None, :]
    if ORDERED:
        two = words[:, :, None] >> (2 * place)
        pairs = (((two << 15) & 0x8000) | ((two << 30) & -0x80000000)) ^ minus_ones
    else:
        pairs = ((words[:, :, None] << (15 - place)) & -0x7FFF8000) ^ minus_ones
    low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    return tl.join(low.to(dtype, bitcast=True), high.to(dtype, bitcast=True))


@triton.jit
def _three_terms(values: tl.tensor) -> tl.tensor:
    """Three bfloat16 numbers whose sum is the float32 number, without rounding, which could give infinity."""
    high = (values.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    rest = tl.where(tl.abs(values) == float("inf"), 0.0, values - high)  # NaN where it is NaN
    middle = (rest.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)


@triton.jit
def _in_slots(values: tl.tensor, SLOTS: tl.constexpr) -> tl.tensor:
    """The terms of each value and zeros, on new axes behind it."""
    if values.dtype == tl.float32:
        high, middle, low = _three_terms(values)
        values = tl.join(tl.join(high, middle), tl.join(low, tl.zeros_like(low)))
        if SLOTS == 8:
            values = tl.join(values, tl.zeros_like(values))
    else:
        if SLOTS >= 2:
            values = tl.join(values, tl.zeros_like(values))
        if SLOTS >= 4:
            values = tl.join(values, tl.zeros_like(values))
        if SLOTS == 8:
            values = tl.join(values, tl.zeros_like(values))
    return values


@triton.jit
def _scale_of(scale: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """λ, or what `GlobalScale` makes of its parameter: at least the smallest positive number of its dtype."""
    value = tl.load(scale).to(tl.float32)
    if not SIGNED:
        exponent: tl.constexpr = -24 if scale.dtype.element_ty == tl.float16 else -149
        smallest: tl.constexpr = 2.0 ** (-133 if scale.dtype.element_ty == tl.bfloat16 else exponent)
        value = tl.abs(value)
        value = tl.where(value < smallest, smallest, value)  # NaN stays
    return value


@triton.jit(do_not_specialize=["samples", "minus_ones"])
def _multiply(
    input: tl.tensor,
    bits: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    samples: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    input_features: tl.tensor,
    output_features: tl.tensor,
    minus_ones: tl.tensor,
    TRANSPOSED: tl.constexpr,
    SIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    SAMPLES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SLOTS: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """One tile of the outputs of one block, for some samples. The signs are the left-hand factor."""
    inputs = rows if TRANSPOSED else columns
    outputs = columns if TRANSPOSED else rows
    tiles = tl.cdiv(outputs, OUTPUTS)
    blocks = input_features // inputs
    tile = tl.program_id(0)
    block = (tile // tiles % blocks).to(tl.int64)
    sample = (tile // tiles // blocks).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    first = tile % tiles * OUTPUTS
    end = (tl.cast(blocks, tl.int64) * rows * columns + 7) // 8  # of the bits, in bytes
    dtype: tl.constexpr = tl.float16 if input.dtype.element_ty == tl.float16 else tl.bfloat16
    column = tl.arange(0, INPUTS)
    sums = tl.zeros((OUTPUTS, SAMPLES * SLOTS if SLOTS else SAMPLES), tl.float32)
    for start in range(0, inputs, INPUTS):
        if TRANSPOSED:
            row = start + tl.arange(0, INPUTS)
            word = first // 32 + tl.arange(0, OUTPUTS // 32)
        else:
            row = first + tl.arange(0, OUTPUTS)
            word = start // 32 + tl.arange(0, INPUTS // 32)
        mask = (row < rows)[:, None] & (word * 32 < columns)[None, :]
        words = _load_words(bits, (block * rows + row)[:, None], word[None, :], columns, end, mask, UNIT)
        signs = _signs(words, minus_ones, dtype, SLOTS == 0)
        place = block * inputs + start + column
        if SLOTS:
            # Rows and columns in the order of what the threads hold: thread 4 g + t of a warp has row g of 8 and the
            # four words from word 4 t on, and multiplies rows g and g + 8 of 16 and columns 4 t to 4 t + 3 of 16.
            signs = tl.reshape(signs, (OUTPUTS // (16 * WARPS), 2, WARPS, 8, 4, 4, 8, 2, 2))
            signs = tl.reshape(tl.permute(signs, (0, 2, 1, 3, 5, 6, 4, 7, 8)), (OUTPUTS, INPUTS))
            known = (start + column < inputs)[:, None] & (sample < samples)[None, :]
            values = tl.load(input + sample[None, :] * input_features + place[:, None], mask=known, other=0.0)
            terms = tl.reshape(_in_slots(values, SLOTS), (4, 4, 2, 8, 2, SAMPLES * SLOTS))
            terms = tl.reshape(tl.permute(terms, (1, 3, 0, 4, 2, 5)), (INPUTS, SAMPLES * SLOTS))
            sums = tl.dot(signs, terms, sums)
        else:
            if TRANSPOSED:
                signs = tl.trans(tl.reshape(signs, (INPUTS, OUTPUTS)))
            else:
                signs = tl.reshape(signs, (OUTPUTS, INPUTS))
            known = (sample < samples)[:, None] & (start + column < inputs)[None, :]
            values = tl.load(input + sample[:, None] * input_features + place[None, :], mask=known, other=0.0)
            if values.dtype == tl.float32:
                high, middle, low = _three_terms(values)
                # Tensor cores cut off what lies below the last bit of a sum: small terms first, and to short sums.
                part = tl.dot(signs, tl.trans(low))
                part = tl.dot(signs, tl.trans(middle), part)
                sums += tl.dot(signs, tl.trans(high), part)
            else:
                sums = tl.dot(signs, tl.trans(values), sums)

    row = tl.arange(0, OUTPUTS)
    if SLOTS:
        sums = tl.sum(tl.reshape(sums, (OUTPUTS, SAMPLES, SLOTS)), 2)
        row = row // (16 * WARPS) * (16 * WARPS) + row // 8 % 2 * (8 * WARPS) + row // 16 % WARPS * 8 + row % 8
    row += first
    if scale is not None:
        sums *= _scale_of(scale, SIGNED)
    place = block * outputs + row
    if bias is not None:
        sums += tl.load(bias + place, mask=row < outputs, other=0.0).to(tl.float32)[:, None]
    known = (row < outputs)[:, None] & (sample < samples)[None, :]
    tl.store(output + sample[None, :] * output_features + place[:, None], sums.to(output.dtype.element_ty), mask=known)


def packed_linear(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None = None,
    transposed: bool = False,
    signed_scale: bool = False,
) -> Tensor:
    """``λ S x + b`` for equal blocks."""
    return multiply(input, bits, rows, columns, transposed, scale, bias, signed_scale)


def sign_product(input: Tensor, bits: Tensor, rows: int, columns: int, transposed: bool = False) -> Tensor:
    """``S x`` for equal blocks."""
    return multiply(input, bits, rows, columns, transposed)


def multiply(
    input: Tensor,
    bits: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    signed_scale: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """``S x``, times a scale and plus a bias where they are given; the tile is a choice for measurements alone."""
    blocks = _blocks_of(input, bits, rows, columns, transposed, scale, bias)
    features, outputs = input.shape[-1], columns if transposed else rows
    input = input.contiguous()
    output = input.new_empty((*input.shape[:-1], blocks * outputs))
    samples = input.numel() // features
    if samples == 0:
        return output
    tile = tile or choose_tile(samples, outputs, blocks, input.dtype, transposed)
    starts_at_words = columns % 32 == 0 and bits.data_ptr() % 4 == 0
    programs = triton.cdiv(outputs, tile.outputs) * blocks * triton.cdiv(samples, tile.samples)
    with torch.cuda.device_of(input):
        _multiply[(programs,)](
            input,
            bits,
            scale,
            None if bias is None else bias.contiguous(),
            output,
            samples,
            rows,
            columns,
            features,
            blocks * outputs,
            _MINUS_ONES[input.dtype],
            TRANSPOSED=transposed,
            SIGNED=signed_scale,
            UNIT=(4 if columns % 128 == 0 else 1) if starts_at_words else 0,
            SAMPLES=tile.samples,
            OUTPUTS=tile.outputs,
            INPUTS=tile.inputs,
            SLOTS=tile.slots,
            WARPS=tile.warps,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return output


def _blocks_of(
    input: Tensor, bits: Tensor, rows: int, columns: int, transposed: bool, scale: Tensor | None, bias: Tensor | None
) -> int:
    """The number of blocks. Raises RuntimeError where the arguments do not fit each other."""
    _expect(rows > 0 and columns > 0, f"blocks of at least one row and one column, got {rows} and {columns}")
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    features = input.shape[-1] if input.dim() else 0
    blocks = features // inputs
    _expect(blocks > 0 and features % inputs == 0, f"an input with a multiple of {inputs} features, got {features}")
    _expect(input.dtype in _MINUS_ONES, f"float32, bfloat16 or float16, got {input.dtype}")
    size = (blocks * rows * columns + 7) // 8
    _expect(
        bits.dtype == torch.uint8 and bits.shape == (size,) and bits.is_contiguous(),
        f"the bits of {blocks * rows * columns} weights, uint8, contiguous, of shape ({size},)",
    )
    _expect(scale is None or scale.shape == (1,), "a scale of shape (1,)")
    _expect(
        bias is None or (bias.shape == (blocks * outputs,) and bias.dtype == input.dtype),
        f"a bias of shape ({blocks * outputs},) in the dtype of the input",
    )
    _expect(
        all(each is None or each.device == input.device for each in (bits, scale, bias)), "all tensors on one device"
    )
    return blocks


def _expect(condition: bool, expected: str) -> None:
    if not condition:
        raise RuntimeError(f"pibinn: expected {expected}")
