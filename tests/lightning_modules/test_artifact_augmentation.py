"""Distortions of artifacts against what they do to sinusoids, lines and noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.data.artifact_augmentation import ArtifactAugmentation, compress, high_pass

RATE, SAMPLES = 256.0, 512


@settings(deadline=None, max_examples=30)
@given(periods=st.integers(1, 100), cutoff=st.floats(0, 5), phase=st.floats(0, 6))
def test_a_sinusoid_leaves_the_high_pass_as_that_of_a_resistor_and_a_capacitor(periods, cutoff, phase):
    """Gain ``f / sqrt(f² + f_c²)``, ahead by ``atan(f_c / f)``."""
    frequency = periods * RATE / SAMPLES
    angle = 2 * math.pi * frequency * torch.arange(SAMPLES, dtype=torch.float64) / RATE + phase
    expected = frequency / math.hypot(frequency, cutoff) * torch.cos(angle + math.atan2(cutoff, frequency))
    found = high_pass(3.0 + torch.cos(angle)[None], torch.tensor([cutoff], dtype=torch.float64), RATE)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(0.1, 5), seed=st.integers(0, 99))
def test_a_compressed_signal_is_read_faster_and_turns_round_at_the_ends(factor, seed):
    signal = np.random.default_rng(seed).standard_normal(20)
    mirrored = np.concatenate([signal, signal[-2:0:-1]] * 4 + [signal])
    expected = np.interp(np.arange(20) * factor, np.arange(len(mirrored)), mirrored)
    found = compress(torch.from_numpy(signal)[None], torch.tensor([factor], dtype=torch.float64))[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_a_floor_has_its_share_of_the_power():
    augmentation = ArtifactAugmentation(compression=(1, 1), high_pass=(0, 0), floor=0.5)
    signals = torch.randn(400, SAMPLES) * torch.logspace(-3, 3, 400)[:, None]
    distortions = augmentation.draw(np.random.default_rng(0), 400, SAMPLES)
    centred = signals - signals.mean(1, keepdim=True)
    added = augmentation(signals, distortions, RATE) - centred
    shares = added.square().mean(1).sqrt() / centred.square().mean(1).sqrt()
    assert shares.min() >= 0 and shares.max() < 0.55
    assert shares.mean() == pytest.approx(0.25, abs=0.03)


def test_draws_are_in_their_ranges_and_those_of_their_generator():
    augmentation = ArtifactAugmentation((1.5, 1.6), (0.2, 0.9), 0.0)
    first, second, other = (augmentation.draw(np.random.default_rng(seed), 50, 8) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.cutoff, other.cutoff)
    assert 1.5 <= first.compression.min() < first.compression.max() <= 1.6
    assert 0.2 <= first.cutoff.min() < first.cutoff.max() <= 0.9
    assert not first.floor.any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compression": (0.0, 1.0)}, "compression"),
        ({"compression": (2.0, 1.0)}, "compression"),
        ({"high_pass": (-1.0, 1.0)}, "high_pass"),
        ({"high_pass": (0.0, math.inf)}, "high_pass"),
        ({"high_pass": (0.5,)}, "high_pass"),
        ({"floor": -0.1}, "floor=-0.1"),
        ({"floor": math.nan}, "floor=nan"),
    ],
)
def test_ranges_that_are_none_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        ArtifactAugmentation(**arguments)
