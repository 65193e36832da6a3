"""The table of bytes: sums that can be checked by hand, and the table as it is printed."""

import math

import pytest
import torch
from torch import nn

from pibinn_plugin import PIBiNNError, convert, prepare, summary
from pibinn_plugin.nn import BlockDiagonalLinear
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense

TABLE = """\
 layer      shape   structure        nnz   signs   structure   λ   float   total   bit/weight   bit/link   fp32/this
 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
 0.weight   64x64   block_diagonal   512      64           6         256     326        1.094      0.137        51.0
 2.weight   20x64   banded            79      10           9           0      19        1.924      0.119       269.5
 1                                                                 1,032   1,032                                 1.0
 3                                                                   840     840                                 1.0
 total                               591      74          15   4   2,128   2,221        1.259      0.138        10.6
signs, structure, λ, float, total: bytes as stored. bit/weight, bit/link: stored bits for each structural
weight, and for each element of the dense weights. fp32/this: bytes of the same layers in fp32, dense, over total.
A structure that several weights have is stored once, and counted in the first of them.
"""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 20, bias=False), nn.Linear(20, 10))


TARGETS = {"0.weight": BlockDiagonal(8), "2.weight": Banded(1, 2)}


def test_each_number_by_hand():
    report = summary(prepare(network(), TARGETS))
    assert report.nnz == 64 * 8 + (19 + 20 + 20 + 20)
    assert report.dense_links == 64 * 64 + 20 * 64
    assert report.payload_bytes == 64 + math.ceil(79 / 8)
    assert report.structure_bytes == len(BlockDiagonal(8).to_bytes()) + len(Banded(1, 2).to_bytes())
    assert report.scale_bytes == 4
    batch_norm = 4 * 64 * 4 + 8  # weight, bias, mean and variance; an int64 counter
    assert report.float_bytes == 64 * 4 + batch_norm + (20 * 10 + 10) * 4
    assert report.total_bytes == 74 + report.structure_bytes + 4 + report.float_bytes
    assert report.float_twin_bytes == 4 * report.dense_links + report.float_bytes
    one_bit = 8 * (report.payload_bytes + report.structure_bytes + 4)
    assert report.bits_per_weight == one_bit / report.nnz
    assert report.bits_per_link == one_bit / report.dense_links
    assert report.ratio == report.float_twin_bytes / report.total_bytes


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
def test_prepared_and_packed_models_have_the_same_summary_in_every_scheme(scheme):
    model = prepare(network(), TARGETS, scheme)
    assert summary(model) == summary(convert(model)) == summary(prepare(network(), TARGETS))


def test_totals_are_the_sums_of_the_rows():
    report = summary(convert(prepare(network(), TARGETS)))
    assert [layer.name for layer in report.layers] == ["0.weight", "2.weight", "1", "3"]
    for name in ("nnz", "dense_links", "payload_bytes", "structure_bytes", "float_bytes"):
        assert getattr(report, name) == sum(getattr(layer, name) for layer in report.layers)


def test_every_byte_of_the_state_is_counted_once():
    """Against the packed state dict itself: signs, structures, λ and float tensors."""
    packed = convert(prepare(network(), TARGETS))
    stored = sum(value.numel() * value.element_size() for value in packed.state_dict().values())
    assert summary(packed).total_bytes == stored


def test_a_shared_structure_is_counted_in_the_first_weight_that_has_it():
    band, blocks = Banded(1, 2), BlockDiagonal(8)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    structures = dict(zip(("0.weight", "1.weight", "2.weight", "3.weight"), (blocks, band, blocks, band), strict=True))
    prepared = prepare(model, structures)
    report = summary(prepared)
    assert [layer.structure_bytes for layer in report.layers] == [6, 9, 0, 0]
    assert [layer.structure for layer in report.layers] == list(structures.values())
    assert summary(convert(prepared)) == report


def test_compact_layer_counts_as_the_dense_link_it_is():
    report = summary(prepare(BlockDiagonalLinear(64, 64, 8, bias=False), {"weight": None}))
    assert (report.nnz, report.dense_links) == (512, 4096)
    assert report.total_bytes == 64 + 6 + 4


def test_several_one_bit_weights_in_one_module_share_its_float_bytes_once():
    report = summary(prepare(nn.Bilinear(4, 4, 4), {"weight": Dense()}))
    assert report.float_bytes == 16
    cell = summary(prepare(nn.LSTMCell(4, 4), {"weight_*": None}))
    assert cell.float_bytes == 2 * 16 * 4


def test_model_without_one_bit_weights_is_refused():
    with pytest.raises(PIBiNNError, match="prepare it first"):
        summary(network())


def test_printed_table():
    """The numbers are those that `test_each_number_by_hand` counts; here it is their place and their legend."""
    assert str(summary(prepare(network(), TARGETS))) == TABLE.rstrip("\n")


def test_a_model_without_values_is_counted_like_one_with_them():
    """On the meta device λ has no value to look at; four bytes is what it takes in float32."""
    with torch.device("meta"):
        empty = prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), {"*.weight": BlockDiagonal(2)})
    real = prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), {"*.weight": BlockDiagonal(2)})
    assert summary(empty) == summary(real)
    assert summary(empty).scale_bytes == 4
