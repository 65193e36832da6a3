"""What an exported file is compared with, on which inputs, and how much its outputs may differ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pibinn_plugin import ExportError
from pibinn_plugin.comparison import check_same_outputs
from pibinn_plugin.export.verify import verify


def network(x):
    return 3 * x + 1


def recorded(seen, change=lambda y, call: y):
    """A file that computes what the network does, and notes what it is asked for."""

    def run(inputs):
        seen.append(inputs)
        return [change(network(*inputs), len(seen))]

    return run


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_file_is_run_on_the_inputs_and_on_another_random_batch(dynamic):
    seen, x = [], torch.randn(4, 3)
    verify(recorded(seen), network, (x,), dynamic)
    [(first,), (second,)] = seen
    assert torch.equal(first, x)
    assert second.shape == (4 + dynamic, 3)
    assert second.dtype == x.dtype
    assert not torch.isin(second, x).any()


@pytest.mark.parametrize("wrong", [1, 2])
def test_either_batch_alone_may_show_it(wrong):
    seen = []
    run = recorded(seen, lambda y, call: y + 1 if call == wrong else y)
    with pytest.raises(ExportError, match="output 0 of the exported file differs"):
        verify(run, network, (torch.randn(4, 3),), True)
    assert len(seen) == wrong


def test_only_a_second_batch_of_another_size_shows_it():
    """A file in which the batch became a constant."""

    def run(inputs):
        return [network(*inputs)[:4]]

    verify(run, network, (torch.randn(4, 3),), False)
    with pytest.raises(ExportError, match=r"shapes \[\(4, 3\)\], the network \[\(5, 3\)\]"):
        verify(run, network, (torch.randn(4, 3),), True)


def test_only_a_second_batch_of_other_values_shows_it():
    """A file in which the inputs became constants."""
    x = torch.randn(4, 3)
    with pytest.raises(ExportError, match="differs from the network"):
        verify(lambda inputs: [network(x)], network, (x,), False)


def test_a_file_that_does_not_run_is_refused_with_its_shapes():
    def run(inputs):
        raise RuntimeError("no such kernel")

    with pytest.raises(ExportError, match=r"does not run on inputs of shapes \[\(4, 3\)\]: no such kernel"):
        verify(run, network, (torch.randn(4, 3),), True)


def test_integers_stay_among_those_that_were_given():
    seen = []
    verify(recorded(seen), network, (torch.tensor([[2, 5], [7, 2]]),), True)
    assert seen[1][0].shape == (3, 2)
    assert set(seen[1][0].flatten().tolist()) <= {2, 5, 7}


@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(1e-6, 1e6),
    st.integers(0, 9),
    st.sampled_from([-1, 1]),
    st.booleans(),
)
def test_outputs_differ_by_a_ten_thousandth_of_the_largest_at_most(dtype, size, place, sign, is_small):
    expected = size * torch.linspace(-1, 1, 10, dtype=dtype)
    actual = expected.clone()
    actual[place] += sign * size * (0.9e-4 if is_small else 1.2e-4)
    if is_small:
        check_same_outputs(actual, expected, "a", "b")
    else:
        with pytest.raises(ValueError, match="output 0 of a differs from b"):
            check_same_outputs(actual, expected, "a", "b")


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 8 * 2**-10), (torch.bfloat16, 8 * 2**-7)])
def test_half_precision_may_differ_by_eight_of_its_own_roundings(dtype, allowed):
    expected = torch.ones(3, dtype=dtype)
    check_same_outputs(torch.full((3,), 1 + 0.9 * allowed), expected, "a", "b")
    with pytest.raises(ValueError, match="differs"):
        check_same_outputs(torch.full((3,), 1 + 1.1 * allowed), expected, "a", "b")


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("actual", "expected", "is_same"),
    [
        ([NAN, 1.0], [NAN, 1.0], True),
        ([1.0, 1.0], [NAN, 1.0], False),
        ([NAN, 1.0], [1.0, 1.0], False),
        ([INFINITY, 1.0], [INFINITY, 1.0], True),
        ([INFINITY, 1.0], [-INFINITY, 1.0], False),
        ([INFINITY, 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [INFINITY, 1.0], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([1e-30, 0.0], [0.0, 0.0], False),
        ([1j, 1.0], [1j, 1.0], True),
        ([1j, 1.0], [-1j, 1.0], False),
    ],
)
def test_what_is_not_finite_or_not_real_is_compared_too(actual, expected, is_same):
    if is_same:
        check_same_outputs(torch.tensor(actual), torch.tensor(expected), "a", "b")
    else:
        with pytest.raises(ValueError, match="differs"):
            check_same_outputs(torch.tensor(actual), torch.tensor(expected), "a", "b")


@pytest.mark.parametrize(
    "actual",
    [torch.ones(3, 1), torch.ones(4), [torch.ones(3), torch.ones(3)], [], {"a": torch.ones(1, 3)}],
)
def test_other_shapes_or_another_number_of_outputs_are_refused(actual):
    with pytest.raises(ExportError, match=r"a returns shapes .*, b \[\(3,\)\]"):
        check_same_outputs(actual, torch.ones(3), "a", "b", ExportError)
