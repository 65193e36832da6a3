"""Walsh patterns: an orthonormal basis of ±1, in orders that are checked by counting."""

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.walsh_patterns import WALSH_ORDERS, WalshPatterns, sign_changes, walsh_order

BLOCKS = st.sampled_from([1, 2, 4, 8])
ORDERS = st.sampled_from(sorted(WALSH_ORDERS))


def changes(lines):
    """Sign changes of arrays along their last axis, counted from products of neighbours."""
    return (lines[..., 1:] * lines[..., :-1] < 0).sum(-1)


def pieces(pattern):
    """How many connected regions of one sign a pattern has."""
    return scipy.ndimage.label(pattern > 0)[1] + scipy.ndimage.label(pattern < 0)[1]


# What each order sorts by, of a block × block pattern.
COUNTED = {
    "sequency": lambda pattern: changes(pattern.flatten()),
    "total_sequency": lambda pattern: changes(pattern)[0] + changes(pattern.T)[0],
    "largest_sequency": lambda pattern: max(changes(pattern)[0], changes(pattern.T)[0]),
    "cake_cutting": pieces,
}


def patterns(block, order):
    """All patterns in an order, shape (block², block, block), entries ±1."""
    matrix = block * WalshPatterns(block, block**2, order).matrix()
    return matrix.reshape(-1, block, block).numpy()


@given(BLOCKS, ORDERS)
def test_every_order_is_a_permutation_of_an_orthonormal_basis(block, order):
    assert sorted(walsh_order(block, order).tolist()) == list(range(block**2))
    matrix = WalshPatterns(block, block**2, order).matrix()
    assert torch.equal(matrix @ matrix.T, torch.eye(block**2))
    assert matrix.abs().unique().tolist() == [1 / block]


@pytest.mark.parametrize("order", COUNTED)
@pytest.mark.parametrize("block", [2, 4, 8, 16])
def test_an_order_is_by_what_it_counts(block, order):
    counts = [COUNTED[order](pattern) for pattern in patterns(block, order)]
    assert counts == sorted(counts)


def test_orders_agree_with_scipy():
    hadamard = scipy.linalg.hadamard(64)
    np.testing.assert_array_equal(patterns(8, "natural").reshape(64, 64), hadamard)
    walsh = hadamard[np.argsort(changes(hadamard), kind="stable")]
    np.testing.assert_array_equal(patterns(8, "sequency").reshape(64, 64), walsh)


def test_a_walsh_matrix_has_every_number_of_sign_changes_once():
    matrix = 4 * WalshPatterns(4, 16, "sequency").matrix()
    assert sign_changes(matrix).tolist() == list(range(16))


@given(BLOCKS, ORDERS, st.data())
def test_fewer_patterns_are_the_first_ones(block, order, data):
    count = data.draw(st.integers(1, block**2))
    assert torch.equal(
        WalshPatterns(block, count, order).matrix(), WalshPatterns(block, block**2, order).matrix()[:count]
    )


def test_the_square_of_low_frequencies():
    first = patterns(4, "largest_sequency")[:4]
    assert {(int(changes(pattern.T)[0]), int(changes(pattern)[0])) for pattern in first} == {
        (0, 0), (0, 1), (1, 0), (1, 1)
    }  # fmt: skip


def test_nothing_is_stored():
    assert WalshPatterns(4, 3).state_dict() == {}
    assert not list(WalshPatterns(4, 3).parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"block_size": 12}, "block_size=12: .* power of two"),
        ({"order": "zigzag"}, "order='zigzag': expected one of natural, sequency"),
        ({"block_size": 4, "measurements": 17}, "measurements=17"),
        ({"measurements": 0}, "measurements=0"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_unfit_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        WalshPatterns(**arguments)
