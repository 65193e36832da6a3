"""The reference semantics: sign with sign(0) = +1, one λ, the mask after the sign."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from pibinn_plugin import ScaleError, StructureError
from pibinn_plugin.quantizer import GlobalScale, SignQuantizer, initial_scale, quantize_sign, sign_ste
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
latents = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(-1e4, 1e4, width=32))
scales = st.floats(2**-10, 2.0**10, width=32)


@given(latents, st.sampled_from(DTYPES))
def test_sign_is_exactly_one_in_every_dtype(array, dtype):
    latent = torch.from_numpy(array).to(dtype)
    sign = sign_ste(latent)
    assert sign.dtype == dtype
    assert np.array_equal(sign.double().numpy(), np.where(latent.double().numpy() >= 0, 1.0, -1.0))


def test_sign_of_zero_is_plus_one():
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    assert sign_ste(zeros).tolist() == [1.0, 1.0, 1.0, -1.0]
    # The mask comes after the sign: a latent of zero inside M is a weight, one outside is not.
    weight = quantize_sign(zeros[:2], torch.tensor([0.5]), torch.tensor([True, False]))
    assert weight.tolist() == [0.5, 0.0]


@given(latents, scales, st.data())
def test_quantized_weights_are_scale_times_sign_inside_the_mask(array, scale, data):
    mask = data.draw(hnp.arrays(bool, array.shape))
    weight = quantize_sign(torch.from_numpy(array), torch.tensor([scale]), torch.from_numpy(mask))
    expected = np.where(mask, np.where(array >= 0, np.float32(scale), -np.float32(scale)), np.float32(0))
    assert np.array_equal(weight.numpy(), expected)
    assert not np.signbit(weight.numpy()[~mask]).any()  # +0.0: weights are compared bit for bit
    again = quantize_sign(weight, torch.tensor([scale]), torch.from_numpy(mask))
    assert torch.equal(again, weight)


def test_gradient_passes_straight_through_to_the_latent_and_sums_into_the_scale():
    latent = torch.tensor([[-3.0, 0.2], [0.0, 5.0]], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    mask = torch.tensor([[True, True], [False, True]])
    upstream = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    (quantize_sign(latent, scale, mask) * upstream).sum().backward()
    assert torch.equal(latent.grad, 0.5 * upstream * mask)
    assert scale.grad.tolist() == [-1.0 + 10.0 + 1000.0]


def test_trap_ste_traces_under_jvp_vmap_and_hessian():
    """An autograd.Function would need rules of its own for each of these."""
    latent, scale = torch.randn(4), torch.tensor([0.5])
    value, tangent = torch.func.jvp(lambda v: quantize_sign(v, scale), (latent,), (torch.ones(4),))
    assert torch.equal(tangent, torch.full((4,), 0.5))
    batch = torch.randn(3, 4)
    assert torch.equal(torch.func.vmap(lambda v: quantize_sign(v, scale))(batch), quantize_sign(batch, scale))
    per_sample = torch.func.vmap(torch.func.grad(lambda v: quantize_sign(v, scale).sum()))(batch)
    assert torch.equal(per_sample, torch.full((3, 4), 0.5))
    hessian = torch.func.hessian(lambda v: (quantize_sign(v, scale) ** 2).sum())(latent)
    assert torch.equal(hessian, 2 * 0.25 * torch.eye(4))
    assert torch.equal(value, quantize_sign(latent, scale))


@given(st.lists(hnp.arrays(np.float32, st.integers(1, 8), elements=st.floats(-8, 8, width=32)), min_size=1))
def test_initial_scale_is_the_least_squares_one(arrays):
    total = np.concatenate(arrays).astype(np.float64)
    if not np.abs(total).sum():
        with pytest.raises(ScaleError, match="mean"):
            initial_scale(map(torch.from_numpy, arrays))
        return
    scale = initial_scale(map(torch.from_numpy, arrays))
    assert math.isclose(scale, np.abs(total).mean(), rel_tol=1e-12)

    def loss(candidate):
        return ((total - candidate * np.where(total >= 0, 1, -1)) ** 2).sum()

    assert loss(scale) <= min(loss(scale * 1.01), loss(scale * 0.99))


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("nan")], [float("inf"), 1.0]])
def test_initial_scale_of_degenerate_latents_is_refused(values):
    with pytest.raises(ScaleError):
        initial_scale([torch.tensor(values)])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive_and_finite(value):
    with pytest.raises(ScaleError, match="positive and finite"):
        GlobalScale(value)
    scale = GlobalScale(0.5)
    with pytest.raises(ScaleError):
        scale.set(value)
    assert scale().item() == 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_positive_whatever_an_optimizer_does_to_it(dtype):
    scale = GlobalScale(0.5, dtype=dtype)
    assert scale().dtype == dtype
    assert scale().item() == 0.5
    for value in (-0.25, 0.0, -1e-30, 3.0):
        with torch.no_grad():
            scale.value.fill_(value)
        assert scale().item() > 0
    optimizer = torch.optim.SGD(scale.parameters(), lr=1.0)
    scale.set(0.5)
    for _ in range(3):
        optimizer.zero_grad()
        scale().sum().backward()
        optimizer.step()
        assert scale().item() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_the_magnitude_of_its_parameter_down_to_the_smallest_number(dtype):
    scale, smallest = GlobalScale(0.5, dtype=dtype), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for value, expected in ((-0.25, 0.25), (smallest, smallest), (-3 * smallest, 3 * smallest), (0.0, smallest)):
        with torch.no_grad():
            scale.value.fill_(value)
        assert scale().item() == expected > 0
    scale.set(smallest)
    assert scale().item() == smallest
    with pytest.raises(ScaleError, match=r"rounds to 0\.0|got 0\.0"):
        scale.set(smallest / 4)


@pytest.mark.parametrize(("value", "dtype"), [(1e-20, torch.float16), (1e6, torch.float16), (1e-60, torch.float32)])
def test_a_cast_that_would_make_the_scale_zero_or_infinite_is_refused(value, dtype):
    scale = GlobalScale(value, dtype=torch.float64)
    with pytest.raises(ScaleError, match="which rounds to"):
        scale.to(dtype)
    assert scale.value.dtype == torch.float64
    assert scale().item() == value
    assert scale.to(torch.float64)().item() == value


def test_trap_scale_has_one_dimension_for_fsdp():
    """FSDP2 refuses parameters without a dimension."""
    assert GlobalScale(0.5).value.shape == GlobalScale(0.5)().shape == (1,)


@pytest.mark.parametrize(
    ("structure", "shape", "compact", "has_mask"),
    [
        (Dense(), (4, 6), False, False),
        (BlockDiagonal(2), (4, 6), False, True),
        (BlockDiagonal(2), (4, 6), True, False),
        (Banded(1, 1), (4, 6), True, False),
        (Mask(torch.eye(4)), (4, 4), False, True),
    ],
)
def test_sign_quantizer_is_the_pure_function(structure, shape, compact, has_mask):
    scale = GlobalScale(0.3)
    quantizer = SignQuantizer(scale, structure, shape, compact)
    latent = torch.randn(structure.compact_shape(shape) if compact else shape)
    mask = structure.mask(shape) if has_mask else None
    assert torch.equal(quantizer(latent), quantize_sign(latent, scale(), mask))
    assert torch.equal(quantizer.structural(latent), latent if compact else structure.to_compact(latent))
    assert (quantizer.mask is not None) == has_mask
    assert list(quantizer.parameters()) == []  # λ is registered at the root, not here
    assert list(quantizer.state_dict()) == ["_extra_state"]


def test_disabled_quantizer_is_the_masked_latent_with_a_zero_gradient_for_the_scale():
    scale = GlobalScale(0.3)
    quantizer = SignQuantizer(scale, BlockDiagonal(2), (2, 2))
    quantizer.enabled = False
    latent = torch.tensor([[1.5, 2.0], [3.0, -4.0]], requires_grad=True)
    weight = quantizer(latent)
    weight.sum().backward()
    assert weight.tolist() == [[1.5, 0.0], [0.0, -4.0]]
    assert latent.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert scale.value.grad.tolist() == [0.0]


def test_structure_that_does_not_fit_is_refused():
    with pytest.raises(StructureError, match="divisor"):
        SignQuantizer(GlobalScale(), BlockDiagonal(3), (4, 4))


def test_state_of_another_structure_is_refused():
    state = SignQuantizer(GlobalScale(), BlockDiagonal(2), (4, 4)).state_dict()
    SignQuantizer(GlobalScale(), BlockDiagonal(2), (4, 4)).load_state_dict(state)
    with pytest.raises(StructureError, match=r"blocks=2.*blocks=4"):
        SignQuantizer(GlobalScale(), BlockDiagonal(4), (4, 4)).load_state_dict(state)


def test_mask_of_a_quantizer_follows_its_device_from_meta():
    quantizer = SignQuantizer(GlobalScale(1.0), BlockDiagonal(2), (4, 4), device="meta")
    moved = copy.deepcopy(quantizer).to_empty(device="cpu")
    assert torch.equal(moved.mask, BlockDiagonal(2).mask((4, 4)))
    # load_state_dict(assign=True) gives real latents to a module that never left the meta device.
    latent = torch.randn(4, 4)
    assert torch.equal(quantizer(latent), quantize_sign(latent, torch.ones(1), BlockDiagonal(2).mask((4, 4))))


def test_moving_and_casting_keep_the_mask():
    module = nn.Sequential(SignQuantizer(GlobalScale(0.5), Banded(0, 0), (3, 3))).double()
    assert module[0].mask.dtype == torch.bool
    assert torch.equal(module(torch.ones(3, 3, dtype=torch.float64)), 0.5 * torch.eye(3, dtype=torch.float64))
