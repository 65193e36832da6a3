"""Measurements through a network that recovers what was measured: vectors, and those of image blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_modules.apply.arrays import Progress, check_finite, in_batches
from lightning_modules.data.files import DataFileError

__all__ = ["apply_to_blocks", "apply_to_vectors"]

_BATCH = 256
_FARTHEST = 30.0  # times the amplitude in training: another unit, to all that is known


def apply_to_vectors(
    network: nn.Module, array: npt.NDArray[Any], inputs: dict[str, Any], source: Path, progress: Progress
) -> npt.NDArray[Any]:
    """Recover the unknowns of measurement vectors.

    Args:
        network: maps measurements, shape (vectors, measurements), to unknowns.
        array: shape (measurements,) or (vectors, measurements).
        inputs: ``size``, the number of measurements; ``deviation``, their standard deviation in training.
        source: where the array is from, for errors.
        progress: shows how far it is.

    Returns:
        Shape (unknowns,) or (vectors, unknowns), the data type of ``array``.

    Raises:
        DataFileError: another number of measurements, values that are not finite, or of another magnitude.
    """
    size = inputs["size"]
    if array.ndim not in (1, 2) or array.shape[-1] != size:
        expected = f"({size},) or (vectors, {size})"
        raise DataFileError(source, f"shape {array.shape}", expected, "Put the measurements on the last axis.")
    vectors = _measured(array, 1, inputs, source)
    answers = in_batches(network, vectors, _BATCH, progress).numpy().astype(array.dtype)
    return answers if array.ndim == 2 else answers[0]


def apply_to_blocks(
    network: nn.Module, array: npt.NDArray[Any], inputs: dict[str, Any], source: Path, progress: Progress
) -> npt.NDArray[Any]:
    """Recover images from the measurements of their blocks.

    Args:
        network: maps measurements, shape (images, measurements, rows, columns), to images (images, 1, height, width).
        array: shape (measurements, rows, columns) or (images, measurements, rows, columns).
        inputs: ``size``, the number of measurements of a block; ``deviation``, their standard deviation in training.
        source: where the array is from, for errors.
        progress: shows how far it is.

    Returns:
        Grey levels in [0, 1], shape (height, width) or (images, height, width), the data type of ``array``.

    Raises:
        DataFileError: another number of measurements, values that are not finite, or of another magnitude.
    """
    size = inputs["size"]
    if array.ndim not in (3, 4) or array.shape[-3] != size:
        expected = f"({size}, rows, columns) or (images, {size}, rows, columns)"
        raise DataFileError(source, f"shape {array.shape}", expected, "Give one position for each block.")
    measured = _measured(array, 3, inputs, source)
    images = in_batches(network, measured, 1, progress).clamp(0, 1)[:, 0].numpy().astype(array.dtype)
    return images if array.ndim == 4 else images[0]


def _measured(array: npt.NDArray[Any], dimensions: int, inputs: dict[str, Any], source: Path) -> Tensor:
    """Examples of so many dimensions in float32, one or several, in the units of training: thresholds are in those."""
    check_finite(array, source)
    deviation, known = float(np.std(array.astype(np.float64))), inputs["deviation"]
    if deviation > 0 and not known / _FARTHEST <= deviation <= known * _FARTHEST:
        found = f"measurements of standard deviation {deviation:.3g}"
        raise DataFileError(source, found, f"about {known:.3g}, as in training", "Convert them to its units.")
    examples = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return examples.reshape(-1, *array.shape[-dimensions:])
