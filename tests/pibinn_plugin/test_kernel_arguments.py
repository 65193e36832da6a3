"""The operators as anybody may call them: the product with the dense matrix, or an error, and never a crash.

What a wrong argument could break is the memory of the process: each of these tests would end it, not only fail.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import pibinn_plugin as pb
from pibinn_plugin.bits import unpack_bits
from pibinn_plugin.functional import kernel
from pibinn_plugin.structure.sparse_rows import sparse_rows

pytestmark = pytest.mark.skipif(kernel() == "torch", reason="the native kernel was not built, or is switched off")

# Those beyond memory have to be beyond all memory.
SIZES = st.one_of(st.integers(0, 9), st.sampled_from([-1, -2, -(2**63), 2**61, 2**62, 2**63 - 1]))
RARELY = st.sampled_from([0, 0, 0, 0, 1, -1])
BITS = torch.zeros(4, dtype=torch.uint8)  # of 4 rows of 8 columns
SCALE = torch.ones(1)
PATTERN = pb.Mask([[1, 0, 1], [0, 1, 1]])


def outcome(operator, *arguments):
    """The result, or None where the operator refuses its arguments."""
    try:
        return operator(*arguments)
    except RuntimeError:
        return None


def bytes_of(weights):
    return -(-weights // 8)


def random_bits(count):
    """So many bytes of packed signs, at least 0 and at most 1000, and the signs."""
    bits = torch.randint(0, 256, (min(max(count, 0), 1000),), dtype=torch.uint8)
    return bits, unpack_bits(bits, 8 * len(bits)).float() * 2 - 1


def random_input(samples, features):
    """Integers, whose sums are exact, of at least 0 and at most 1000 features."""
    return torch.randint(-99, 100, (samples, min(max(features, 0), 1000))).float()


# ------------------------------------------------------------------------------------------------------- of any kind


def test_wrong_tensors_for_blocks_are_errors():
    operator, x = torch.ops.pibinn.packed_linear.default, torch.ones(8)
    assert operator(x, BITS, SCALE, 4, 8).tolist() == [-8.0] * 4
    for arguments in (
        (torch.ones(9), BITS, SCALE, 4, 8),
        (torch.ones(16), BITS, SCALE, 4, 8),
        (torch.ones(()), BITS, SCALE, 4, 8),
        (torch.ones(0), BITS, SCALE, 4, 8),
        (x.double(), BITS, SCALE, 4, 8),
        (x.int(), BITS, SCALE, 4, 8),
        (torch.ones(0, 8).double(), BITS, SCALE, 4, 8),
        (x, BITS[:3], SCALE, 4, 8),
        (x, BITS.repeat(2), SCALE, 4, 8),
        (x, BITS.repeat(2)[::2], SCALE, 4, 8),
        (x, BITS[None], SCALE, 4, 8),
        (x, BITS.int(), SCALE, 4, 8),
        (x, BITS.bool(), SCALE, 4, 8),
        (x, BITS, torch.ones(2), 4, 8),
        (x, BITS, torch.ones(0), 4, 8),
        (x, BITS, torch.ones(()), 4, 8),
        (x, BITS, SCALE.double(), 4, 8),
        (x, BITS, SCALE, 4, 8, torch.ones(3)),
        (x, BITS, SCALE, 4, 8, torch.ones(8)[::2]),
        (x, BITS, SCALE, 4, 8, torch.ones(4).half()),
        (torch.ones(0, 8), BITS, SCALE, 4, 8, torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="pibinn: "):
            operator(*arguments)


def test_bits_that_are_prepared_for_something_else_are_errors():
    operators, x = torch.ops.pibinn, torch.ones(3, 8)
    words = operators.prepare(BITS, [4], [8])
    assert torch.equal(
        operators.packed_linear(x, words, SCALE, 4, 8), operators.packed_linear.uneven(x, words, SCALE, [4], [8])
    )
    for operator, *arguments in (
        (operators.packed_linear, x, words[:31], SCALE, 4, 8),
        (operators.packed_linear, x, words.repeat(2), SCALE, 4, 8),
        (operators.packed_linear, x, words.repeat(2)[::2], SCALE, 4, 8),
        (operators.packed_linear, x, words[None], SCALE, 4, 8),
        (operators.packed_linear, x[:, :4].contiguous(), words, SCALE, 4, 8, None, True),
        (operators.packed_linear.uneven, x, words, SCALE, [4, 33], [4, 4]),
        (operators.prepare, words, [4], [8]),
        (operators.prepare, BITS[:3], [4], [8]),
        (operators.prepare, BITS, [4, 1], [8]),
        (operators.prepare, BITS, [-4], [-8]),
        (operators.unpack, words, SCALE, 32, torch.float32),
    ):
        with pytest.raises(RuntimeError, match="pibinn: "):
            operator(*arguments)


def test_wrong_activation_scales_are_errors():
    operator, x = torch.ops.pibinn.packed_linear_int8.default, torch.ones(3, 8)
    assert operator(x, BITS, SCALE, torch.ones(3, 1), 4, 8).tolist() == [[-8.0] * 4] * 3
    for scales in (torch.ones(2, 1), torch.ones(0), torch.ones(3, 1).half(), torch.ones(3, 2)[:, :1]):
        with pytest.raises(RuntimeError, match="pibinn: "):
            operator(x, BITS, SCALE, scales, 4, 8)
    with pytest.raises(RuntimeError, match="pibinn: "):
        operator(x[:0], BITS, SCALE, torch.ones(1), 4, 8)


def test_a_weight_is_written_at_positions_within_it_and_nowhere_else():
    operator, bits, scale = torch.ops.pibinn.refresh.default, torch.tensor([0b101], dtype=torch.uint8), torch.ones(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        memory, seen = torch.full((8,), 7.0, dtype=dtype), torch.zeros(5, dtype=torch.uint8)
        weight = memory[1:7].view(2, 3)
        operator(weight, seen, bits, scale, torch.tensor([5, 0, 2]))
        assert memory.tolist() == [7, -1, 0, 1, 0, 0, 1, 7]
        assert seen.tolist() == [0b101, 0, 0, 0x80, 0x3F]
        for wrong in ([0, 1, 6], [0, -1, 1], [0, 2**40, 1], [[0, 1, 2]], [0, 1] * 8, [0.0, 1.0, 2.0]):
            with pytest.raises(RuntimeError, match="pibinn: "):
                operator(weight, torch.zeros(5, dtype=torch.uint8), bits, scale, torch.tensor(wrong))
            assert memory.tolist() == [7, -1, 0, 1, 0, 0, 1, 7]


# ---------------------------------------------------------------------------------------------------------- of sizes


@given(SIZES, SIZES, st.integers(0, 3), RARELY, RARELY, st.booleans())
@example(2**61, 8, 1, 0, 0, False)  # the number of bits is 0 modulo 2**64
@example(2**61, 8, 1, 0, 1, False)
@example(-4, -8, 1, 16, 0, False)
@example(-4, 8, 1, 12, 4, True)
@example(8, -4, 0, 8, 4, True)
def test_equal_blocks_of_any_size(rows, columns, count, more_features, more_bytes, transposed):
    inputs = rows if transposed else columns
    bits, signs = random_bits(bytes_of(count * rows * columns % 2**64) + more_bytes)
    x = random_input(2, count * inputs + more_features)
    result = outcome(torch.ops.pibinn.sign_product.default, x, bits, rows, columns, transposed)
    is_valid = min(rows, columns, x.shape[1]) > 0 and x.shape[1] % inputs == 0
    weights = x.shape[1] // inputs * rows * columns if is_valid else 0
    assert (result is not None) == (is_valid and len(bits) == bytes_of(weights))
    if result is not None:
        matrix = torch.block_diag(*signs[:weights].view(-1, rows, columns))
        assert torch.equal(result, x @ (matrix if transposed else matrix.T))


@given(st.lists(st.tuples(SIZES, SIZES), max_size=3), RARELY, RARELY, st.booleans())
@example([(-1, 8), (5, 8)], 0, 0, False)
@example([(-40, 1), (44, 1)], 0, 0, False)
@example([(-40, 1), (44, 1)], 0, 0, True)
@example([(-3, -3)], 6, 0, False)
@example([(2**62, 0), (2**62, 0), (1, 8)], 0, 0, False)
@example([(2**32, 2**32)], 0, 0, False)
def test_blocks_of_their_own_sizes(blocks, more_features, more_bytes, transposed):
    rows, columns = ([sizes[i] for sizes in blocks] for i in (0, 1))
    weights = sum(row * column for row, column in blocks)
    inputs, outputs = (sum(rows), sum(columns)) if transposed else (sum(columns), sum(rows))
    bits, signs = random_bits(bytes_of(weights % 2**64) + more_bytes)
    x = random_input(2, inputs + more_features)
    is_valid = min(rows + columns, default=0) >= 0 and x.shape[1] == inputs and len(bits) == bytes_of(weights)
    result = outcome(torch.ops.pibinn.sign_product.uneven, x, bits, rows, columns, transposed)
    assert (result is not None) == (is_valid and outputs < 2**61)  # so many fit no memory
    if result is not None:
        matrix = torch.zeros(sum(rows), sum(columns))
        row = column = bit = 0
        for height, width in blocks:
            matrix[row : row + height, column : column + width] = signs[bit : bit + height * width].view(height, width)
            row, column, bit = row + height, column + width, bit + height * width
        assert torch.equal(result, x @ (matrix if transposed else matrix.T))


def test_rows_of_blocks_without_columns_are_an_error():
    with pytest.raises(RuntimeError, match="pibinn: expected as many rows as columns"):
        torch.ops.pibinn.sign_product.uneven(torch.ones(8), BITS, [4], [4, 4])


# ------------------------------------------------------------------------------------------------------ of an index


@pytest.mark.parametrize("overload", ["sparse", "sparse_unchecked"])
def test_wrong_tensors_for_an_index_are_errors(overload):
    operator = getattr(torch.ops.pibinn.packed_linear, overload)
    x, index, bits = torch.ones(3), sparse_rows(PATTERN, (2, 3)), BITS[:1]
    assert operator(x, bits, SCALE, index, [2, 3]).tolist() == [-2.0, -2.0]
    for arguments in (
        (torch.ones(2), bits, SCALE, index, [2, 3]),
        (x.double(), bits, SCALE, index, [2, 3]),
        (x, BITS[:2], SCALE, index, [2, 3]),
        (x, bits, SCALE, index.long(), [2, 3]),
        (x, bits, SCALE, index.float(), [2, 3]),
        (x, bits, SCALE, index[:-1], [2, 3]),
        (x, bits, SCALE, index[1:], [2, 3]),
        (x, bits, SCALE, index[:2], [2, 3]),
        (x, bits, SCALE, index[:0], [2, 3]),
        (x, bits, SCALE, index[None], [2, 3]),
        (x, bits, SCALE, index.repeat(2)[::2], [2, 3]),
        (x, bits, SCALE, index, [2]),
        (x, bits, SCALE, index, [3, 3]),
        (x, bits, SCALE, index, [-2, 3]),
        (x, bits, SCALE, index, [2, -3]),
        (x, bits, SCALE, index, [2**62, 3]),
        (x, bits, SCALE, index, [2**40, 3]),
        (x, bits, SCALE, torch.cat([index, index[:1]]), [2, 3]),
        (x, bits, SCALE, torch.cat([torch.ones(1, dtype=torch.int32), index[1:]]), [2, 3]),
        (x, bits, SCALE, index, [2, 3], torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="pibinn: "):
            operator(*arguments)


def test_sums_of_int8_that_do_not_fit_32_bits_are_errors():
    """127 · 2²⁴ is a little less than 2³¹; one column fewer is the most that is taken."""
    columns = 2**24
    x, bits, ones = torch.ones(1, columns), torch.full((columns // 8,), 255, dtype=torch.uint8), torch.ones(1, 1)
    operator = torch.ops.pibinn.packed_linear_int8
    with pytest.raises(RuntimeError, match="fewer than 16777216 columns"):
        operator(x, bits, SCALE, ones / 127, 1, columns)
    few = columns - 1
    assert operator(x[:, :few], bits, SCALE, ones / 127, 1, few).item() == pytest.approx(few, rel=1e-6)


INDEX = [0, 2, 2, 5, 1, 3, 0, 2, 3]  # of 3 rows of 4 columns; its bits may be in another order
ORDER = [4, 0, 3, 1, 2]


@given(
    st.booleans(),
    st.integers(0, len(INDEX + ORDER) - 1),
    st.one_of(st.integers(-2, 8), st.sampled_from([2**31 - 1, -(2**31), 10**6, -(10**6)])),
    st.sampled_from([1, 2, 40]),
    st.booleans(),
)
@example(False, 4, 10**9, 1, False)  # a column
@example(False, 8, -1, 40, True)
@example(False, 4, 4, 1, True)  # the one behind the last
@example(False, 1, 3, 1, False)  # a start behind the next one
@example(False, 2, -(2**31), 1, True)
@example(True, 13, 10**9, 1, False)  # the place of a bit
def test_an_index_with_any_number_in_it(is_ordered, place, number, samples, transposed):
    values = INDEX + ORDER if is_ordered else list(INDEX)
    values[place % len(values)] = number
    starts, columns, order = values[:4], values[4:9], values[9:] or list(range(5))
    is_valid = starts[0] == 0 and starts[3] == 5 and sorted(starts) == starts
    is_valid = is_valid and all(0 <= column < 4 for column in columns) and all(0 <= bit < 5 for bit in order)
    bits, signs = random_bits(1)
    x, index = random_input(samples, 3 if transposed else 4), torch.tensor(values, dtype=torch.int32)
    result = outcome(torch.ops.pibinn.sign_product.sparse, x, bits, index, [3, 4], transposed)
    assert (result is not None) == is_valid
    if result is not None:
        matrix = torch.zeros(3, 4)
        for row in range(3):
            for nonzero in range(starts[row], starts[row + 1]):
                matrix[row, columns[nonzero]] += signs[order[nonzero]]
        assert torch.equal(result, x @ (matrix if transposed else matrix.T))
