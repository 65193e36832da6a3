"""Learned patterns at full light: what is shown of one-bit, ternary and float weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pibinn_plugin as pb
from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.compare.callback import attach_baseline
from lightning_modules.mirror_patterns import MirrorPatterns
from lightning_modules.walsh_patterns import WalshPatterns


def shown(operator):
    """The patterns in units of full light."""
    return operator.block_size * operator.matrix().detach()


@pytest.mark.parametrize("start", [WalshPatterns(4, 6), BlockPatterns(4, 6)])
def test_weights_start_with_the_signs_of_given_patterns_and_spread_magnitudes(start):
    operator = MirrorPatterns(start)
    assert (operator.block_size, operator.shape) == (4, (6, 16))
    assert torch.equal(operator.weight.sign(), start.matrix().sign())
    magnitudes = operator.weight.detach().abs()
    assert 0.3 <= magnitudes.min() < 0.5 and 0.8 < magnitudes.max() <= 1


@given(st.floats(1e-3, 1e3))
def test_one_bit_patterns_are_those_of_a_device_whatever_the_scale(scale):
    operator = pb.prepare(MirrorPatterns(WalshPatterns(4, 6)), {"weight": None})
    pb.global_scale(operator).set(scale)
    assert torch.equal(operator.matrix(), WalshPatterns(4, 6).matrix())


def test_the_gradient_of_the_scale_vanishes():
    operator = pb.prepare(MirrorPatterns(WalshPatterns(4, 6)), {"weight": None})
    operator.A(torch.rand(2, 1, 8, 8)).square().sum().backward()
    latent = next(parameter for name, parameter in operator.named_parameters() if name.endswith("original"))
    assert latent.grad.abs().max() > 0.1
    assert pb.global_scale(operator).value.grad.abs() < 1e-3


@pytest.mark.parametrize("clip", [False, True])
def test_ternary_patterns_have_full_light(clip):
    operator = MirrorPatterns(WalshPatterns(4, 6), clip=clip)
    attach_baseline(operator, {"weight": None}, "ternary_b158")
    assert shown(operator).unique().tolist() == [-1, 0, 1]


def test_float_patterns_are_clipped_or_dimmed():
    clipped, dimmed = MirrorPatterns(WalshPatterns(4, 6), clip=True), MirrorPatterns(WalshPatterns(4, 6))
    weight = torch.linspace(-2, 2, 96).reshape(6, 16)
    for operator in (clipped, dimmed):
        with torch.no_grad():
            operator.weight.copy_(weight)
    torch.testing.assert_close(shown(clipped), weight.clamp(-1, 1))
    torch.testing.assert_close(shown(dimmed), weight / 2)
    clipped.A(torch.rand(1, 1, 4, 4)).sum().backward()
    assert clipped.weight.grad.ne(0).all()  # a clipped weight can come back


def test_clipped_patterns_that_are_rounded_have_full_light():
    operator = MirrorPatterns(WalshPatterns(4, 6), clip=True)
    pb.prepare(operator, {"weight": None})
    for scale in (0.6, 1.7):
        pb.global_scale(operator).set(scale)
        assert torch.equal(operator.matrix(), WalshPatterns(4, 6).matrix())


def test_a_packed_operator_has_the_same_patterns(tmp_path):
    operator = pb.prepare(MirrorPatterns(BlockPatterns(4, 6, seed=3)), {"weight": None})
    path = pb.save(pb.convert(operator), tmp_path / "patterns.safetensors")
    loaded = pb.load(path)
    assert torch.equal(loaded.matrix(), operator.matrix())
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(loaded.A(x), operator.A(x))
