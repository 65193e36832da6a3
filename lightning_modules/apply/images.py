"""Images through a network of images: PNG and JPEG in and out, or grey levels in [0, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lightning_modules.apply.arrays import Progress, check_finite, in_batches
from lightning_modules.data.files import DataFileError
from lightning_modules.data.images import IMAGE_SUFFIXES, read_grey_image
from pibinn_plugin.storage.atomic_file import atomic_file

__all__ = ["apply_to_image", "is_image_file", "read_image", "write_image"]

_GREY_LEVELS = 255
_FARTHEST = 4.0  # noise leaves [0, 1]; grey levels of 255 leave this


def is_image_file(data: object) -> bool:
    """Whether this is the path of an image, by its suffix."""
    return isinstance(data, str | Path) and Path(data).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: Path) -> npt.NDArray[np.float32]:
    """The grey levels of an image file in [0, 1]; colours become grey, as in training."""
    return (read_grey_image(path).float() / _GREY_LEVELS).numpy()


def apply_to_image(
    network: nn.Module, array: npt.NDArray[Any], inputs: dict[str, Any], source: Path, progress: Progress
) -> npt.NDArray[Any]:
    """Recover images.

    Args:
        network: maps images, shape (images, 1, height, width), to images.
        array: grey levels in [0, 1] but for noise, shape (height, width) or (images, height, width).
        inputs: not read.
        source: where the array is from, for errors.
        progress: shows how far it is.

    Returns:
        The shape and data type of ``array``, cut to [0, 1].

    Raises:
        DataFileError: another number of dimensions, or values that are no grey levels in [0, 1].
        ArtifactError: images that are too small for the network.
    """
    if array.ndim not in (2, 3):
        remedy = "Give grey images."
        raise DataFileError(source, f"shape {array.shape}", "(height, width) or (images, height, width)", remedy)
    check_finite(array, source)
    if np.abs(array).max() > _FARTHEST:
        found = f"values from {array.min():g} to {array.max():g}"
        raise DataFileError(source, found, "grey levels in [0, 1]", "Divide them by their largest level, such as 255.")
    images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).reshape(-1, 1, *array.shape[-2:])
    answers = in_batches(network, images, 1, progress)
    return answers.clamp(0, 1).numpy().reshape(array.shape).astype(array.dtype)


def write_image(path: Path, array: npt.NDArray[Any]) -> None:
    """Write grey levels in [0, 1] as an image of 8 bits; it is there whole or not at all.

    Raises:
        DataFileError: several images.
    """
    from PIL import Image

    if array.ndim != 2:
        raise DataFileError(path, f"{array.shape[0]} images", "one", "Write several into a file *.npy.")
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    levels = np.rint(array.clip(0, 1) * _GREY_LEVELS).astype(np.uint8)
    with atomic_file(path) as partial:
        Image.fromarray(levels).save(partial, format=kind, **({} if kind == "PNG" else {"quality": 95}))
