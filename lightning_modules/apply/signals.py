"""Signals of any length through a network of windows: overlapping windows, faded into one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_modules.apply.arrays import Progress, check_finite, in_batches
from lightning_modules.data.files import DataFileError
from pibinn_plugin.errors import ArtifactError

__all__ = ["apply_to_signals", "windows_of"]

_BATCH = 64
# Volts in each unit; "uV" and the two letters that look like µ are one unit.
_VOLTS = {"V": 1.0, "mV": 1e-3, "µV": 1e-6, "nV": 1e-9}
_MICRO = {"uV": "µV", "\u03bcV": "µV"}
# Standard deviations of what a scalp shows, in volts, with wide margins on both sides.
_PLAUSIBLE_VOLTS = (1e-8, 1e-2)


def apply_to_signals(
    network: nn.Module,
    array: npt.NDArray[Any],
    inputs: dict[str, Any],
    sampling_rate: float | None,
    unit: str | None,
    source: Path,
    progress: Progress,
) -> npt.NDArray[Any]:
    """Clean signals.

    The signal is brought to the unit of the network, and back afterwards; so is each window to a standard deviation
    of one, where the network was trained so. Windows overlap by half; where they do, their answers are mixed with
    weights of a Hann window. A signal of exactly one window is answered as in training.

    Args:
        network: maps windows, shape (windows, samples), to windows.
        array: shape (samples,), or (channels, samples) for independent channels.
        inputs: ``sampling_rate`` in Hz, ``unit``, ``window`` in samples, ``normalisation``: ``"deviation"`` of each
            window, or ``"none"``.
        sampling_rate: of the array, in Hz.
        unit: of the array; that of ``inputs`` unless given.
        source: where the array is from, for errors.
        progress: shows how far it is.

    Returns:
        The shape, data type and unit of ``array``.

    Raises:
        DataFileError: another sampling rate, an unknown unit, values that are not of that unit, not finite or not
            of one or two dimensions.
        ArtifactError: an unknown normalisation.
    """
    if array.ndim not in (1, 2):
        remedy = "Put the samples on the last axis, channels before it."
        raise DataFileError(source, f"shape {array.shape}", "(samples,) or (channels, samples)", remedy)
    _check_rate(sampling_rate, inputs["sampling_rate"], source)
    check_finite(array, source)
    factor = _units(array, unit, inputs["unit"], source)
    if (normalisation := inputs["normalisation"]) not in ("deviation", "none"):
        raise ArtifactError(f"the file has the normalisation {normalisation!r}; expected 'deviation' or 'none'")
    signals = torch.from_numpy(np.ascontiguousarray(array)).reshape(-1, array.shape[-1]).double() * factor
    is_divided = normalisation == "deviation"
    cleaned = torch.stack([_clean(network, signal, inputs["window"], is_divided, progress) for signal in signals])
    return (cleaned / factor).numpy().reshape(array.shape).astype(array.dtype)


def windows_of(length: int, window: int) -> list[int]:
    """Where the windows of a signal start: half a window apart, the last one at the end.

    Example:
        >>> windows_of(1200, 512), windows_of(512, 512)
        ([0, 256, 512, 688], [0])
    """
    return [*range(0, length - window, max(window // 2, 1)), length - window]


def _clean(network: nn.Module, signal: Tensor, window: int, is_divided: bool, progress: Progress) -> Tensor:
    length = len(signal)
    if length < window:  # mirrored at its end, again and again, until it fills a window
        signal = torch.cat([signal, signal.flip(0)]).repeat(window // (2 * length) + 1)[:window]
    starts = torch.tensor(windows_of(len(signal), window))
    places = starts[:, None] + torch.arange(window)
    windows = signal[places]
    deviations = windows.std(1, correction=0, keepdim=True)
    deviations = torch.where((deviations > 0) & is_divided, deviations, 1.0)  # none of a flat window
    answers = in_batches(network, (windows / deviations).float(), _BATCH, progress).double() * deviations
    weights = torch.hann_window(window + 2, periodic=False, dtype=torch.float64)[1:-1].expand_as(answers)
    total = torch.zeros_like(signal).index_put_((places,), weights, accumulate=True)
    mixed = torch.zeros_like(signal).index_put_((places,), weights * answers, accumulate=True)
    return (mixed / total)[:length]


def _check_rate(given: float | None, expected: float, source: Path) -> None:
    if given is None:
        remedy = f"Give --sampling_rate {expected:g} if it is that."
        raise DataFileError(source, "a signal of unknown sampling rate", f"{expected:g} Hz", remedy)
    if not abs(given - expected) <= 1e-3 * expected:
        remedy = "Resample it first, such as by scipy.signal.resample_poly."
        raise DataFileError(source, f"a sampling rate of {given:g} Hz", f"{expected:g} Hz", remedy)


def _units(array: npt.NDArray[Any], given: str | None, expected: str, source: Path) -> float:
    """How many of the expected unit the given one is, once it is plausible that the array is in it."""
    unit, expected = (_MICRO.get(name, name) for name in (given or expected, expected))
    for name in (unit, expected):
        if name not in _VOLTS:
            raise DataFileError(source, f"the unit {name!r}", f"one of {', '.join(_VOLTS)}", "Convert it.")
    deviation = float(np.std(array.astype(np.float64)))
    lowest, highest = (bound / _VOLTS[unit] for bound in _PLAUSIBLE_VOLTS)
    if deviation > 0 and not lowest <= deviation <= highest:
        found = f"values of standard deviation {deviation:.3g}"
        remedy = f"Say which unit it is: --unit {' or '.join(_VOLTS)}."
        raise DataFileError(source, found, f"a signal in {unit}, from {lowest:g} to {highest:g}", remedy)
    return _VOLTS[unit] / _VOLTS[expected]
