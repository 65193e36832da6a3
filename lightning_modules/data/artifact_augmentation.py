"""Artifacts as other laboratories would have recorded them, for training that carries over to their recordings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["ArtifactAugmentation", "Distortions", "compress", "high_pass"]


class Distortions(NamedTuple):
    """What is done to each of some artifact epochs.

    ``compression`` and ``cutoff`` (Hz) have the shape (epochs,), ``floor`` (epochs, samples) is white noise in units of
    the root mean square of its epoch.
    """

    compression: Tensor
    cutoff: Tensor
    floor: Tensor

    def of(self, rows: list[int]) -> Distortions:
        """Those of some of the epochs."""
        return Distortions(*(column[rows] for column in self))


@dataclass(frozen=True)
class ArtifactAugmentation:
    """Random compression in time, high-pass and white floor of artifact epochs, each uniform in its range.

    Amplifiers differ in their high-pass, subjects in how fast their eyes move, and a smooth recording has less noise
    than most. A network that has seen one laboratory's artifacts only takes its high-pass for a property of eyes.

    Args:
        compression: least and most; 2 plays an epoch at twice its speed, continued by its mirror image.
        high_pass: least and highest cutoff of a first-order high-pass, in Hz.
        floor: the most root mean square of the white noise, as a fraction of that of the epoch; the least is 0.

    Raises:
        ValueError: a range that is not one.

    Example:
        >>> augmentation = ArtifactAugmentation()
        >>> distortions = augmentation.draw(np.random.default_rng(0), epochs=3, samples=512)
        >>> augmentation(torch.randn(3, 512), distortions, sampling_rate=256.0).shape
        torch.Size([3, 512])
    """

    compression: tuple[float, float] = (1.0, 2.2)
    high_pass: tuple[float, float] = (0.3, 0.8)
    floor: float = 0.06

    def __post_init__(self) -> None:
        ranges = (self.compression, self.high_pass)
        if not all(len(pair) == 2 and 0 <= pair[0] <= pair[1] < math.inf for pair in ranges) or not self.compression[0]:
            raise ValueError(
                f"compression={self.compression}, high_pass={self.high_pass}: each is a (least, most) of finite "
                f"numbers, those of compression above 0, those of high_pass at least 0"
            )
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"floor={self.floor}: it is a fraction of the root mean square, at least 0")

    def draw(self, random: np.random.Generator, epochs: int, samples: int) -> Distortions:
        """Distortions of some epochs."""
        compression, cutoff, level = (
            torch.from_numpy(random.uniform(*pair, size=epochs).astype(np.float32))
            for pair in (self.compression, self.high_pass, (0.0, self.floor))
        )
        noise = torch.from_numpy(random.standard_normal((epochs, samples), dtype=np.float32))
        return Distortions(compression, cutoff, level.unsqueeze(1) * noise)

    def __call__(self, artifacts: Tensor, distortions: Distortions, sampling_rate: float) -> Tensor:
        """Distorted epochs, shape (epochs, samples) as given, at a sampling rate in Hz."""
        distorted = high_pass(compress(artifacts, distortions.compression), distortions.cutoff, sampling_rate)
        return distorted + distorted.square().mean(1, keepdim=True).sqrt() * distortions.floor


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
