"""The structures of a file: each distinct one once, given back to its weights, and nothing that is read trusted."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from pibinn_plugin import ArtifactError, convert, load, prepare, save, summary
from pibinn_plugin.storage.stored_structures import StoredStructures
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask, Structure
from pibinn_plugin.weights import packed_weights

STRUCTURES = [
    Dense(),
    BlockDiagonal(2),
    BlockDiagonal(rows=(1, 3), columns=(2, 2)),
    Banded(0, 2),
    Mask([[1, 0, 0], [0, 1, 1]]),
    Mask([[1, 0, 0], [0, 1, 0]]),  # two masks of one shape
    Mask([[1, 0], [0, 0], [1, 1]]),
]


def copied(structure):
    """An equal structure in another object, as each layer of a network builds its own."""
    return Structure.from_bytes(structure.to_bytes())


@given(st.lists(st.sampled_from(STRUCTURES), max_size=12))
def test_every_weight_gets_its_structure_back_and_shares_the_object(structures):
    stored = StoredStructures.of(map(copied, structures))
    decoded = stored.decode()
    assert decoded == structures
    assert len({id(structure) for structure in decoded}) == len(set(structures)) == len(stored.lengths)
    assert bytes(stored.content.tolist()) == b"".join(s.to_bytes() for s in dict.fromkeys(structures))


STORED = StoredStructures.of([Dense(), BlockDiagonal(2), Dense()])
anything = st.one_of(st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=2), st.just([0]))


@given(
    lengths=st.one_of(anything, st.lists(st.one_of(st.sampled_from([0, 1, 6]), anything), max_size=3)),
    numbers=st.lists(st.one_of(st.sampled_from([0, 1, 2]), anything), min_size=3, max_size=3),
)
def test_no_other_header_is_read(lengths, numbers):
    """Of all lengths and numbers, the content has one reading, but for the choice of each weight."""
    is_valid = lengths == [1, 6] and numbers in ([0, 1, 0], [0, 1, 1], [0, 0, 1])
    if is_valid and all(type(number) is int for number in (*lengths, *numbers)):
        distinct = [Dense(), BlockDiagonal(2)]
        assert StoredStructures(STORED.content, lengths, numbers).decode() == [distinct[number] for number in numbers]
    else:
        with pytest.raises(ArtifactError):
            StoredStructures(STORED.content, lengths, numbers).decode()


@pytest.mark.parametrize(
    ("lengths", "numbers", "words"),
    [
        ([1, 6], [0, 1, 2], "number their structures"),
        ([1, 6], [0, 1, -1], "number their structures"),
        ([1, 6], [0, 0, 0], "number their structures"),  # one that no weight uses
        ([1, 6], [1, 0, 0], "order of first use"),
        ([1, 6], [False, True, False], "number their structures"),
        ([1, 6], [0.0, 1, 0], "number their structures"),
        ([1, 6], [[0], 1, 0], "number their structures"),
        ([1, 5], [0, 1, 0], "take 7 bytes, not the 6"),
        ([1, 2**70], [0, 1, 0], "take 7 bytes"),
        ([-1, 8], [0, 1, 0], "positive whole numbers"),
        ([7, 0], [0, 1, 0], "positive whole numbers"),
        ([True, 6], [0, 1, 0], "positive whole numbers"),
        ([1.0, 6.0], [0, 1, 0], "positive whole numbers"),
        (["1", 6], [0, 1, 0], "positive whole numbers"),
        ({"1": 1, "6": 6}, [0, 1, 0], "positive whole numbers"),
        (None, [0, 1, 0], "positive whole numbers"),
        ([6, 1], [0, 1, 0], "structure 0"),  # the bytes of another split describe nothing
        ([], [], "take 7 bytes"),
    ],
)
def test_each_defect_is_named(lengths, numbers, words):
    with pytest.raises(ArtifactError, match=words):
        StoredStructures(STORED.content, lengths, numbers).decode()


@pytest.mark.parametrize("content", [STORED.content.int(), STORED.content.float(), STORED.content[None]])
def test_content_is_a_list_of_bytes(content):
    with pytest.raises(ArtifactError, match="list of bytes"):
        StoredStructures(content, STORED.lengths, STORED.numbers).decode()


def network(layers):
    return nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(layers)))


def random_mask(seed):
    return Mask(torch.rand(24, 24, generator=torch.Generator().manual_seed(seed)) < 0.1)


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
def test_a_file_grows_by_signs_and_a_header_line_a_layer(scheme, tmp_path):
    mask = random_mask(0)
    signs = -(-mask.nnz((24, 24)) // 8)
    sizes = []
    for layers in (1, 2, 9):
        targets = {f"{layer}.weight": copied(mask) for layer in range(layers)}
        packed = convert(prepare(network(layers), targets, scheme))
        path = save(packed, tmp_path / "net.safetensors")
        (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
        sizes.append(path.stat().st_size - 8 - header_bytes)
        assert header_bytes <= 256 * (layers + 1)
        assert summary(packed).total_bytes == sizes[-1]
        loaded = load(path, into=network(layers))
        assert len({id(weight.structure) for weight in packed_weights(loaded)}) == 1
        assert all(torch.equal(one.weight, other.weight) for one, other in zip(loaded, packed, strict=True))
    assert sizes == [len(mask.to_bytes()) + 4 + layers * signs for layers in (1, 2, 9)]


def test_two_structures_of_one_shape_stay_apart(tmp_path):
    first, second = random_mask(0), random_mask(1)
    targets = {"0.weight": first, "1.weight": second, "2.weight": first}
    packed = convert(prepare(network(3), targets))
    path = save(packed, tmp_path / "net.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["pibinn"])
    assert header["structures"] == [len(first.to_bytes()), len(second.to_bytes())]
    assert [number for _, _, number, _ in header["layers"]] == [0, 1, 0]
    loaded = load(path, into=network(3))
    assert [weight.structure for weight in packed_weights(loaded)] == list(targets.values())
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(loaded, packed, strict=True))


def test_one_rule_serves_weights_of_several_shapes(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6))

    packed = convert(prepare(model(), {"*.weight": BlockDiagonal(2)}))
    assert summary(packed).structure_bytes == len(BlockDiagonal(2).to_bytes())
    loaded = load(save(packed, tmp_path / "net.safetensors"), into=model())
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(loaded, packed, strict=True))
