"""Artifacts as other laboratories would have recorded them, for training that carries over to their recordings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["ArtifactAugmentation", "Distortions", "compress", "high_pass", "low_pass"]


class Distortions(NamedTuple):
    """What is done to each of some artifact epochs.

    ``other`` are the row numbers of the epochs that are added to them, ``share`` how much of these, in root mean
    squares; ``lowest`` and ``highest`` are cutoffs in Hz. All these and ``compression`` have the shape (epochs,).
    ``floor``, (epochs, samples), is white noise in units of the root mean square of its epoch.
    """

    other: Tensor
    share: Tensor
    compression: Tensor
    lowest: Tensor
    highest: Tensor
    floor: Tensor

    def of(self, rows: list[int]) -> Distortions:
        """Those of some of the epochs."""
        return Distortions(*(column[rows] for column in self))


@dataclass(frozen=True)
class ArtifactAugmentation:
    """Artifact epochs in pairs, at other speeds, behind other amplifiers: each draw is uniform in its range.

    Amplifiers differ in the band that they pass, subjects in how fast and how often their eyes move, and a smooth
    recording has less noise than most. A network that has seen one laboratory's artifacts only takes its filters for a
    property of eyes.

    Args:
        mixing: the most of another epoch that is added, in root mean squares of the first; half of the epochs get none.
        compression: least and most; 2 plays an epoch at twice its speed, continued by its mirror image.
        high_pass: least and highest cutoff of a first-order high-pass, in Hz.
        low_pass: least and highest cutoff of a low-pass, in Hz, for half of the epochs.
        floor: the most root mean square of the white noise, as a fraction of that of the epoch; the least is 0.

    Raises:
        ValueError: a range that is not one.

    Example:
        >>> augmentation, epochs = ArtifactAugmentation(), torch.randn(10, 512)
        >>> distortions = augmentation.draw(np.random.default_rng(0), draws=3, epochs=10, samples=512)
        >>> augmentation(epochs, torch.tensor([4, 1, 4]), distortions, sampling_rate=256.0).shape
        torch.Size([3, 512])
    """

    mixing: float = 1.0
    compression: tuple[float, float] = (1.0, 2.2)
    high_pass: tuple[float, float] = (0.3, 0.8)
    low_pass: tuple[float, float] = (8.0, 30.0)
    floor: float = 0.06

    def __post_init__(self) -> None:
        ranges = (self.compression, self.high_pass, self.low_pass)
        are_ranges = all(len(pair) == 2 and 0 <= pair[0] <= pair[1] < math.inf for pair in ranges)
        if not are_ranges or not (self.compression[0] and self.low_pass[0]):
            raise ValueError(
                f"compression={self.compression}, high_pass={self.high_pass}, low_pass={self.low_pass}: each is a "
                f"(least, most) of finite numbers, those of high_pass at least 0, all others above 0"
            )
        if not (0 <= self.floor < math.inf and 0 <= self.mixing < math.inf):
            raise ValueError(
                f"mixing={self.mixing}, floor={self.floor}: they are fractions of the root mean square, at least 0"
            )

    def draw(self, random: np.random.Generator, draws: int, epochs: int, samples: int) -> Distortions:
        """Distortions of as many draws from some epochs."""
        ranges = ((-self.mixing, self.mixing), self.compression, self.high_pass, self.low_pass, (0.0, self.floor))
        share, compression, lowest, highest, level = (
            torch.from_numpy(random.uniform(*pair, size=draws).astype(np.float32)) for pair in ranges
        )
        highest[torch.from_numpy(random.random(draws) < 0.5)] = math.inf
        noise = torch.from_numpy(random.standard_normal((draws, samples), dtype=np.float32))
        other = torch.from_numpy(random.integers(epochs, size=draws))
        return Distortions(other, share.clamp_min(0), compression, lowest, highest, level.unsqueeze(1) * noise)

    def __call__(self, epochs: Tensor, rows: Tensor, distortions: Distortions, sampling_rate: float) -> Tensor:
        """Distorted artifacts, shape (rows, samples).

        Args:
            epochs: shape (epochs, samples).
            rows: the numbers of those that are distorted, shape (rows,).
            distortions: of each of them.
            sampling_rate: in Hz.
        """
        first, second = epochs[rows], epochs[distortions.other]
        mixed = first + distortions.share.unsqueeze(1) * _size(first) / _size(second) * second
        compressed = compress(mixed, distortions.compression)
        passed = high_pass(compressed, distortions.lowest, sampling_rate)
        distorted = low_pass(passed, distortions.highest, sampling_rate)
        return distorted + _size(distorted) * distortions.floor


def _size(signals: Tensor) -> Tensor:
    """Root mean squares, shape (signals, 1)."""
    return signals.square().mean(1, keepdim=True).sqrt()


def compress(signals: Tensor, factors: Tensor) -> Tensor:
    """Signals at other speeds: sample t is that at ``factor · t``, by linear interpolation, mirrored at the end.

    Args:
        signals: shape (signals, samples), at least two samples.
        factors: shape (signals,).

    Example:
        >>> compress(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([1.5]))
        tensor([[0.0000, 1.5000, 3.0000, 1.5000]])
    """
    last = signals.shape[1] - 1
    places = (factors.unsqueeze(1) * torch.arange(last + 1)) % (2 * last)
    places = last - (places - last).abs()
    before = places.long().clamp_max(last - 1)
    return signals.gather(1, before).lerp(signals.gather(1, before + 1), places - before)


def high_pass(signals: Tensor, cutoffs: Tensor, sampling_rate: float) -> Tensor:
    """Signals behind a first-order high-pass, ``1 / (1 - i cutoff / f)`` at the frequency f; their means are lost.

    Args:
        signals: shape (signals, samples), taken as periodic.
        cutoffs: shape (signals,), in Hz; 0 takes away the mean only.
        sampling_rate: in Hz.

    Example:
        >>> high_pass(torch.tensor([[2.0, 0.0, 2.0, 0.0]]), torch.tensor([0.0]), 4.0)
        tensor([[ 1., -1.,  1., -1.]])
    """
    samples = signals.shape[1]
    frequencies = torch.fft.rfftfreq(samples, 1 / sampling_rate)[1:]
    delay = cutoffs.unsqueeze(1) / frequencies
    passed = 1 / torch.complex(torch.ones_like(delay), -delay)
    spectra = torch.fft.rfft(signals)
    return torch.fft.irfft(torch.cat([torch.zeros_like(spectra[:, :1]), spectra[:, 1:] * passed], dim=1), n=samples)


def low_pass(signals: Tensor, cutoffs: Tensor, sampling_rate: float) -> Tensor:
    """Signals behind a Butterworth low-pass of order 4, run forth and back: ``1 / (1 + (f / cutoff)^8)`` at f.

    Args:
        signals: shape (signals, samples), taken as periodic.
        cutoffs: shape (signals,), in Hz; infinity lets everything through.
        sampling_rate: in Hz.

    Example:
        >>> low_pass(torch.tensor([[2.0, 0.0, 2.0, 0.0]]), torch.tensor([2.0]), 4.0)
        tensor([[1.5000, 0.5000, 1.5000, 0.5000]])
    """
    samples = signals.shape[1]
    frequencies = torch.fft.rfftfreq(samples, 1 / sampling_rate)
    passed = 1 / (1 + (frequencies / cutoffs.unsqueeze(1)) ** 8)
    return torch.fft.irfft(torch.fft.rfft(signals) * passed, n=samples)
