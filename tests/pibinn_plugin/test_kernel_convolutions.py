"""The operator for convolutions, on every path: torch's convolution of the float weight, whatever divides the work.

Run again for each path by ``make test-paths``.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from pibinn_plugin.bits import pack_bits
from pibinn_plugin.functional import kernel

pytestmark = [
    pytest.mark.skipif(kernel() == "torch", reason="the native kernel was not built, or is switched off"),
    pytest.mark.usefixtures("threads_as_before"),
]

SCALE = 0.37
CONVOLVE = {1: F.conv1d, 2: F.conv2d}


@st.composite
def convolutions(draw):
    """Sizes of the images, channels of a group, groups, and what goes over them; signals are images of one axis."""
    axes = draw(st.integers(1, 2))

    def each(low, high):
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 2)
    sizes = each(1, 24) if axes == 2 else [draw(st.sampled_from((1, 5, 31, 300, 1111)))]
    reaches = zip(sizes, kernel, padding, dilation, strict=True)
    sizes = [max(size, gap * (width - 1) + 1 - 2 * pad) for size, width, pad, gap in reaches]
    channels, outputs = draw(st.integers(1, 20)), draw(st.sampled_from((1, 3, 17, 40, 100, 600)))
    return draw(st.integers(1, 3)), channels, outputs, sizes, kernel, stride, padding, dilation


LARGE = (4, 8, 100, [70, 300], [3, 3], [1, 1], [1, 1], [1, 1])  # pieces of rows, and enough for all threads
SMALL = (1, 40, 64, [4, 4], [3, 3], [1, 1], [1, 1], [1, 1])  # several images at a time
NARROW = (1, 4, 3, [2, 3], [3, 3], [1, 1], [1, 1], [1, 1])  # two rows, which end a vector's length after they begin


def random_case(case, images):
    """An input, its signs, and the arguments after the bits and the scale."""
    groups, channels, outputs, sizes, kernel, stride, padding, dilation = case
    x = torch.randn(images, groups * channels, *sizes)
    signs = torch.rand(groups * outputs, channels, *kernel) < 0.5
    bias = torch.randn(groups * outputs) if outputs % 2 else None
    return x, signs, (groups * outputs, kernel, stride, padding, dilation, groups, bias)


def convolve(x, signs, arguments):
    bits = pack_bits(signs.flatten())
    return torch.ops.pibinn.packed_convolution.default(x, bits, torch.tensor([SCALE]), *arguments)


def expected(x, signs, arguments):
    _, kernel, stride, padding, dilation, groups, bias = arguments
    weight = SCALE * (signs.double() * 2 - 1)
    bias = None if bias is None else bias.double()
    return CONVOLVE[len(kernel)](x.double(), weight, bias, stride, padding, dilation, groups)


@given(convolutions(), st.integers(1, 5), st.sampled_from(("contiguous", "channels last", "strided")))
@example(LARGE, 2, "contiguous")
@example(LARGE, 2, "channels last")
@example(SMALL, 40, "contiguous")
@example(SMALL, 40, "channels last")
@example(NARROW, 1, "contiguous")
def test_convolution_is_that_of_the_float_weight(case, images, layout):
    x, signs, arguments = random_case(case, images)
    if layout == "channels last" and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    if layout == "strided":
        x = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    y, reference = convolve(x, signs, arguments), expected(x, signs, arguments)
    inputs = math.prod(signs.shape[1:])
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-6 * inputs)
    is_channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = convolve(torch.empty_strided(x.shape, x.stride()), signs, arguments)
    assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


@given(convolutions(), st.integers(1, 40))
@example(LARGE, 2)
@example(SMALL, 40)
def test_threads_and_other_images_change_nothing(case, images):
    x, signs, arguments = random_case(case, images)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(convolve(x, signs, arguments))
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert torch.equal(convolve(x[-1:], signs, arguments), results[0][-1:])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_infinite_missing_and_huge_inputs_keep_their_meaning(value):
    """Only under the kernel, and with the sign that its weight gives them."""
    x, signs, arguments = random_case((1, 6, 100, [9, 9], [3, 3], [1, 1], [1, 1], [1, 1]), 1)
    x.zero_()
    x[0, 2, 4, 5] = value
    y = convolve(x, signs, arguments)
    assert torch.count_nonzero(y) == 100 * 9
    torch.testing.assert_close(y, expected(x, signs, arguments).float(), equal_nan=True)


def test_no_images_give_no_images():
    x, signs, arguments = random_case(SMALL, 0)
    assert convolve(x, signs, arguments).shape == (0, 64, 4, 4)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups"),
    [(40, [7, 3], [1, 1], 1), (40, [3, 7], [1, 2], 1), (8, [3, 3], [1, 1], 5)],
)
def test_what_does_not_fit_is_an_error(channels, kernel, stride, groups):
    """With all the bits that it asks for: kernels that reach over the padding, outputs in parts of groups."""
    x, signs = torch.randn(2, 40, 4, 4), torch.rand(64, channels, *kernel) < 0.5
    with pytest.raises(RuntimeError, match="pibinn: expected"):
        convolve(x, signs, (64, kernel, stride, [1, 1], [1, 1], groups))


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, 63),
        (0, 0),
        (0, -64),
        (1, [3, 3, 3]),
        (1, [0, 3]),
        (1, [7, 3]),
        (1, [2**62, 2**62]),
        (2, [0, 1]),
        (3, [-1, 1]),
        (3, [2**63 - 1, 1]),
        (4, [1]),
        (4, [2**62, 1]),
        (5, 3),
        (5, 0),
        (6, torch.zeros(63)),
        (6, torch.zeros(64, dtype=torch.float64)),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(place, wrong):
    x, signs, arguments = random_case(SMALL, 2)
    arguments = [*arguments[:place], wrong, *arguments[place + 1 :]]
    with pytest.raises(RuntimeError, match="pibinn: "):
        convolve(x, signs, arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, signs: (x.double(), signs),
        lambda x, signs: (x.bfloat16(), signs),
        lambda x, signs: (x[0], signs),
        lambda x, signs: (x[:, :39], signs),
        lambda x, signs: (x[:, :0], signs),
        lambda x, signs: (x, signs[:63]),
    ],
)
def test_wrong_tensors_are_errors(change):
    x, signs, arguments = random_case(SMALL, 2)
    with pytest.raises(RuntimeError, match="pibinn: "):
        convolve(*change(x, signs), arguments)
