"""The stored forms of structures: nothing that is read is trusted, built before it is checked, or said at length."""

import contextlib
import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structure_cases import structures
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pibinn_plugin import PIBiNNError, StructureError
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask, Structure, mask_encoding
from pibinn_plugin.structure.sparse_rows import sparse_rows


@given(st.binary(max_size=40))
def test_any_bytes_are_a_structure_or_an_error(data):
    try:
        structure = Structure.from_bytes(data)
    except PIBiNNError:
        return
    assert Structure.from_bytes(structure.to_bytes()) == structure


@given(structures(), st.data())
def test_damaged_bytes_are_a_structure_or_an_error(case, data):
    encoded = bytearray(case[0].to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StructureError):
        Structure.from_bytes(bytes(encoded))
    for wrong in (case[0].to_bytes()[:-1], case[0].to_bytes() + b"\0"):
        with pytest.raises(StructureError):
            Structure.from_bytes(wrong)


def stored_mask(shape, encoding, tile, body):
    """The stored form of a mask, written by hand."""
    header = struct.pack(f"<BB{len(shape)}I", 3, len(shape), *shape)
    return header + struct.pack("<BII", encoding, *tile) + bytes(body)


def sum_of_diagonals(size, lower):
    """The elements of the main diagonal of a square matrix and of so many below it."""
    return (lower + 1) * size - lower * (lower + 1) // 2


ONE_TILE = stored_mask((8192, 8192), 1, (8192, 8192), [0, 1, 0])  # 22 bytes for 2^26 elements


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(
    ("data", "shape", "nnz"),
    [
        (ONE_TILE, (8192, 8192), 2**26),
        (stored_mask((2**16, 2**15), 1, (2**16, 2**15), [0, 1, 0]), (2**16, 2**15), 2**31),
        (stored_mask((2**30, 2), 1, (2**29, 1), [0, 1, 1, 0]), (2**30, 2), 2**29),
        (stored_mask((2**31,), 1, (1, 2**30), [0, 1, 1]), (2**31,), 2**30),
        (BlockDiagonal(2**31).to_bytes(), (2**31, 2**31), 2**31),
        (BlockDiagonal(rows=(2**30, 1), columns=(2**30, 1)).to_bytes(), (2**30 + 1, 2**30 + 1), 2**60 + 1),
        (Banded(2**30, 0).to_bytes(), (2**31, 2**31), sum_of_diagonals(2**31, 2**30)),
        (Dense().to_bytes(), (2**30, 2**30), 2**60),
    ],
)
def test_what_bytes_claim_is_known_before_anything_is_built(data, shape, nnz):
    with LargestTensor() as largest:
        for structure in (Structure.from_bytes(data), Structure.from_json(Structure.from_bytes(data).to_json())):
            structure.check(shape)
            assert structure.nnz(shape) == nnz
            assert structure.to_bytes() == data
            assert len({structure, Structure.from_bytes(data)}) == 1
            with pytest.raises(StructureError):
                structure.check((*shape, 3, 3, 3) if isinstance(structure, (Mask, Banded)) else (0, *shape))
    assert largest.elements <= 64


def test_one_tile_of_a_mask_is_the_dense_mask():
    structure = Structure.from_bytes(stored_mask((64, 32), 1, (64, 32), [0, 1, 0]))
    assert structure == Mask(torch.ones(64, 32))
    assert structure.positions((64, 32)).tolist() == list(range(64 * 32))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (stored_mask((2, 2), 0, (1, 1), [0b11011]), "behind the last element"),
        (stored_mask((2, 2), 0, (1, 1), [0b1011, 0]), "2 bytes where 1"),
        (stored_mask((2, 2), 0, (1, 1), []), "0 bytes where 1"),
        (stored_mask((2, 2), 0, (1, 1), [0]), "without a nonzero"),
        (stored_mask((2, 2), 0, (2, 2), [0b1011]), "encoding 0 with tiles of 2 x 2"),
        (stored_mask((2, 2), 2, (1, 1), [0b1011]), "encoding 2"),
        (stored_mask((3, 3), 1, (1, 1), [0, 2, 1, 2, 0, 1]), "row pointers"),  # decreasing
        (stored_mask((3, 3), 1, (1, 1), [0, 2, 0, 2, 0, 1]), "row pointers"),
        (stored_mask((3, 3), 1, (1, 1), [0, 9, 1, 2, 0, 1]), "row pointers"),
        (stored_mask((3, 3), 1, (1, 1), [1, 1, 1, 2, 0, 1]), "row pointers"),  # does not begin with 0
        (stored_mask((3, 3), 1, (1, 1), [0, 1, 1, 3, 0, 1]), "row pointers"),  # one index too few
        (stored_mask((3, 3), 1, (1, 1), [0, 1, 1, 1, 0, 1]), "row pointers"),
        (stored_mask((3, 3), 1, (1, 1), [0, 0, 0]), "row pointers"),
        (stored_mask((3, 3), 1, (1, 1), []), "row pointers"),
        (stored_mask((3, 3), 1, (1, 1), [0, 0, 0, 0]), "without a nonzero"),
        (stored_mask((3, 3), 1, (1, 1), [0, 1, 1, 2, 0, 3]), "beyond 3 columns"),
        (stored_mask((3, 3), 1, (1, 1), [0, 2, 2, 2, 1, 1]), "do not ascend"),  # the same twice
        (stored_mask((3, 3), 1, (1, 1), [0, 2, 2, 2, 1, 0]), "do not ascend"),
        (stored_mask((3, 3), 1, (2, 1), [0, 1, 0]), "tiles of 2 x 1"),
        (stored_mask((3, 3), 1, (1, 2), [0, 1, 1, 1, 0]), "tiles of 1 x 2"),
        (stored_mask((3, 3), 1, (0, 1), [0, 1, 0]), "tiles of 0 x 1"),
        (stored_mask((3, 3), 1, (1, 0), [0, 1, 0]), "tiles of 1 x 0"),
        (stored_mask((0, 3), 0, (1, 1), []), "empty"),
        (stored_mask((2,) * 80, 0, (1, 1), [1]), "80 dimensions"),
        (stored_mask((2,) * 40, 0, (1, 1), [1]), "has 1099511627776 elements"),
        (stored_mask((2**31, 2**31), 1, (2**31, 2**31), [0, 1, 0]), "elements"),
        (stored_mask((2**32 - 1,) * 60, 0, (1, 1), [1]), "more than 2.62 elements"),
        (bytes([1, 0, 0, 0, 0, 0]), "at least one block"),
        (bytes([1, 4, 2, 0, 0, 0]), "not its stored form"),  # an unknown flag
        (bytes([1, 1]) + struct.pack("<7I", 2, 2, 3, 3, 2, 4, 4), "not its stored form"),  # equal blocks as uneven ones
        (bytes([1, 1]) + struct.pack("<7I", 3, 2, 1, 3, 2, 4, 4), "describe 2 blocks"),
        (bytes([1, 2]) + struct.pack("<2I", 2, 2**32 - 1), "do not describe"),
        (bytes([0, 0]), "1 bytes where 0"),
        (bytes([4]), "do not describe"),
        (b"", "do not describe"),
    ],
)
def test_malformed_bytes_are_refused(data, words):
    with pytest.raises(StructureError, match=words):
        Structure.from_bytes(data)
    if data[:1] == b"\x03":
        shape = struct.unpack_from(f"<{data[1]}I", data, 2)
        text = json.dumps({"kind": "mask", "shape": shape, "data": data[2 + 4 * len(shape) :].hex()})
        with pytest.raises(StructureError, match=words):
            Structure.from_json(text)


def test_pointers_are_as_wide_as_the_elements_ask_for():
    """255, 256, 65535 and 65536 elements: pointers of one, two and four bytes."""
    for rows, columns in ((3, 85), (16, 16), (255, 257), (256, 256)):
        pattern = torch.zeros(rows, columns)
        pattern[0, 3], pattern[1, columns - 1], pattern[rows - 1, 0] = 1, 1, 1
        data = mask_encoding.encode(pattern.flatten().nonzero().flatten(), rows, columns)
        pointer = {255: 1, 256: 2, 65535: 2, 65536: 4}[rows * columns]
        csr = 9 + pointer * (rows + 1) + 3 * (2 if columns > 256 else 1)
        assert len(data) == min(csr, 9 + -(-rows * columns // 8))
        assert torch.equal(Mask(pattern).mask((rows, columns)), pattern != 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"kind": "toeplitz"}',
        '{"kind": 1, "blocks": 2}',
        '{"kind": "block_diagonal", "blocks": "8"}',
        '{"kind": "block_diagonal", "blocks": 1.5}',
        '{"kind": "block_diagonal", "blocks": true}',
        '{"kind": "block_diagonal", "blocks": 2, "blocks": 4}',
        '{"kind": "block_diagonal", "blocks": 1e400}',
        '{"kind": "block_diagonal", "blocks": 1' + 5000 * "0" + "}",
        '{"kind": "block_diagonal", "size": 8}',
        '{"kind": "block_diagonal", "rows": 5, "columns": 5}',
        '{"kind": "block_diagonal", "' + 10**6 * "x" + '": 1}',
        '{"kind": "' + 10**6 * "x" + '"}',
        '{"kind": "banded", "lower": 1}',
        '{"kind": "dense", "blocks": 2}',
        '{"kind": "mask", "shape": [2, 2], "data": "zz"}',
        '{"kind": "mask", "shape": [2, 2], "data": "00"}',
        '{"kind": "mask", "shape": "22", "data": ""}',
        '{"kind": "mask", "shape": [2, 2], "data": "0001000000010000000f", "encoding": "bitmap"}',
        '{"kind": "mask", "shape": [2, 2], "data": 15}',
        json.dumps({"kind": "mask", "shape": [2] * 20_000, "data": "00"}),
        json.dumps({"kind": "block_diagonal", "rows": [2**40] * 20_000, "columns": [1] * 20_000}),
        json.dumps({"kind": "block_diagonal", "rows": [0] * 20_000, "columns": [1] * 20_000}),
        json.dumps({"kind": "block_diagonal", "blocks": [[1] * 20_000] * 20}),
        json.dumps({"kind": "block_diagonal", "blocks": 1, "row_order": [0] * 20_000, "column_order": [0]}),
        "[" * 100_000,
    ],
)
def test_json_of_no_structure_is_refused_in_few_words(text):
    with pytest.raises(StructureError) as error:
        Structure.from_json(text)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "structure",
    [
        Dense(),
        Banded(1, 2),
        BlockDiagonal(2),
        BlockDiagonal(rows=(1,) * 9999, columns=(2,) * 9998 + (1,)),
        BlockDiagonal(1, row_order=range(9999), column_order=range(9999)),
        Mask(torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) < 0.5),
    ],
)
def test_what_is_said_of_a_structure_and_a_shape_is_short(structure):
    assert len(repr(structure)) < 700
    for shape in ([2] * 20_000, (2**40, 2**40), [2**31] * 64, (3,) * 60, (0, 2), (-2, -2), ()):
        try:
            structure.check(shape)
        except StructureError as error:
            assert len(str(error)) < 1200
        else:
            assert math.prod(shape) <= 2**62
    with pytest.raises(StructureError, match="20000 dimensions"):
        structure.check([2] * 20_000)


def test_no_index_of_more_than_32_bits_is_made():
    """Of nonzeros or of rows; what is asked is known without any of them."""
    one_tile = Structure.from_bytes(stored_mask((2**16, 2**15), 1, (2**16, 2**15), [0, 1, 0]))
    with LargestTensor() as largest:
        assert sparse_rows(one_tile, (2**16, 2**15)) is None
        assert sparse_rows(BlockDiagonal(2), (2**17, 2**17)) is None
        assert sparse_rows(BlockDiagonal(2**31), (2**31, 2**31)) is None
    assert largest.elements == 0
