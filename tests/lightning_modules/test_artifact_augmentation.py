"""Distortions of artifacts against what they do to sinusoids, lines and noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, freqs_zpk

from lightning_modules.data.artifact_augmentation import (
    ArtifactAugmentation,
    Distortions,
    compress,
    high_pass,
    low_pass,
)

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
@given(periods=st.integers(0, 100), cutoff=st.floats(1, 60), phase=st.floats(0, 6))
def test_a_sinusoid_leaves_the_low_pass_as_a_butterworth_filter_run_both_ways(periods, cutoff, phase):
    frequency = periods * RATE / SAMPLES
    angle = 2 * math.pi * frequency * torch.arange(SAMPLES, dtype=torch.float64) / RATE + phase
    zeros, poles, gain = butter(4, 2 * math.pi * cutoff, analog=True, output="zpk")
    _, response = freqs_zpk(zeros, poles, gain, worN=[2 * math.pi * frequency])
    expected = abs(response[0]) ** 2 * torch.cos(angle)
    found = low_pass(torch.cos(angle)[None], torch.tensor([cutoff], dtype=torch.float64), RATE)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    assert torch.allclose(low_pass(torch.cos(angle)[None], torch.tensor([math.inf]), RATE)[0], torch.cos(angle))


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(0.1, 5), seed=st.integers(0, 99))
def test_a_compressed_signal_is_read_faster_and_turns_round_at_the_ends(factor, seed):
    signal = np.random.default_rng(seed).standard_normal(20)
    mirrored = np.concatenate([signal, signal[-2:0:-1]] * 4 + [signal])
    expected = np.interp(np.arange(20) * factor, np.arange(len(mirrored)), mirrored)
    found = compress(torch.from_numpy(signal)[None], torch.tensor([factor], dtype=torch.float64))[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


ROWS = torch.arange(400)


def test_half_of_the_epochs_get_a_part_of_another_one():
    augmentation = ArtifactAugmentation(mixing=0.8, compression=(1, 1), high_pass=(0, 0), low_pass=(1e9, 1e9), floor=0)
    pool = torch.randn(30, SAMPLES) * torch.logspace(-3, 3, 30)[:, None]
    pool -= pool.mean(1, keepdim=True)
    rows = torch.arange(400) % 30
    distortions = augmentation.draw(np.random.default_rng(0), 400, 30, SAMPLES)
    added = augmentation(pool, rows, distortions, RATE) - pool[rows]
    sizes = pool.square().mean(1).sqrt()
    shares = added.square().mean(1).sqrt() / sizes[rows]
    assert 0.4 < (shares < 1e-3).float().mean() < 0.6
    assert shares.max() < 0.81 and shares[shares > 1e-3].mean() == pytest.approx(0.4, abs=0.05)
    expected = torch.nn.functional.cosine_similarity(added, pool[distortions.other])
    assert expected[shares > 1e-2].min() > 0.999
    assert set(distortions.other.tolist()) == set(range(30))


def test_a_floor_has_its_share_of_the_power():
    augmentation = ArtifactAugmentation(mixing=0, compression=(1, 1), high_pass=(0, 0), low_pass=(1e9, 1e9), floor=0.5)
    signals = torch.randn(400, SAMPLES) * torch.logspace(-3, 3, 400)[:, None]
    distortions = augmentation.draw(np.random.default_rng(0), 400, 400, SAMPLES)
    centred = signals - signals.mean(1, keepdim=True)
    added = augmentation(signals, ROWS, distortions, RATE) - centred
    shares = added.square().mean(1).sqrt() / centred.square().mean(1).sqrt()
    assert shares.min() >= 0 and shares.max() < 0.55
    assert shares.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("compression", "lowest", "highest", "frequency", "gain"),
    [
        (1, 0, math.inf, 4, 1),
        (2, 0, math.inf, 8, 1),
        (1, 4, math.inf, 4, math.sqrt(0.5)),
        (1, 0, 4, 4, 0.5),
        (2, 8, 8, 8, 0.5 * math.sqrt(0.5)),
    ],
)
def test_an_artifact_is_compressed_and_filtered_after_it(compression, lowest, highest, frequency, gain):
    epoch = torch.cos(2 * math.pi * 4 * torch.arange(SAMPLES) / RATE)[None]
    values = (torch.tensor([value], dtype=torch.float32) for value in (0, compression, lowest, highest))
    distortions = Distortions(torch.tensor([0]), *values, torch.zeros(1, SAMPLES))
    amplitudes = torch.fft.rfft(ArtifactAugmentation()(epoch, torch.tensor([0]), distortions, RATE)[0]).abs()
    assert amplitudes.argmax() == frequency * SAMPLES / RATE
    assert amplitudes.max() / (SAMPLES / 2) == pytest.approx(gain, rel=0.03)


def test_draws_are_in_their_ranges_and_those_of_their_generator():
    augmentation = ArtifactAugmentation(0.3, (1.5, 1.6), (0.2, 0.9), (10.0, 20.0), 0.0)
    first, second, other = (augmentation.draw(np.random.default_rng(seed), 50, 9, 8) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.lowest, other.lowest)
    assert first.share.min() == 0 and 0.2 < first.share.max() <= 0.3
    assert 1.5 <= first.compression.min() < first.compression.max() <= 1.6
    assert 0.2 <= first.lowest.min() < first.lowest.max() <= 0.9
    limited = first.highest[first.highest.isfinite()]
    assert 15 < len(limited) < 35 and 10 <= limited.min() < limited.max() <= 20
    assert not first.floor.any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compression": (0.0, 1.0)}, "compression"),
        ({"compression": (2.0, 1.0)}, "compression"),
        ({"high_pass": (-1.0, 1.0)}, "high_pass"),
        ({"high_pass": (0.0, math.inf)}, "high_pass"),
        ({"high_pass": (0.5,)}, "high_pass"),
        ({"low_pass": (0.0, 10.0)}, "low_pass"),
        ({"low_pass": (20.0, 10.0)}, "low_pass"),
        ({"mixing": -0.1}, "mixing=-0.1"),
        ({"mixing": math.inf}, "mixing=inf"),
        ({"floor": -0.1}, "floor=-0.1"),
        ({"floor": math.nan}, "floor=nan"),
    ],
)
def test_ranges_that_are_none_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        ArtifactAugmentation(**arguments)
