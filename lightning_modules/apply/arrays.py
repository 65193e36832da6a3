"""Arrays in and out of `apply`, and the batches in which a network sees them."""

from __future__ import annotations

import tokenize
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_modules.data.files import DataFileError
from pibinn_plugin.errors import ArtifactError
from pibinn_plugin.storage.atomic_file import atomic_file

__all__ = ["Progress", "check_finite", "in_batches", "no_progress", "read_array", "write_array"]

Progress = Callable[[Sequence[Tensor]], Iterable[Tensor]]


def no_progress(batches: Sequence[Tensor]) -> Iterable[Tensor]:
    """The batches as they are."""
    return batches


def read_array(data: str | Path | npt.ArrayLike) -> npt.NDArray[Any]:
    """An array, from a ``.npy`` file where a path is given.

    Raises:
        DataFileError: no such file, one that holds no array, or an array that is not of float numbers.
    """
    expected, path = "a .npy array of float32 or float64", Path(data if isinstance(data, str | Path) else "the array")
    if not isinstance(data, str | Path):
        array = np.asarray(data)
    elif not path.is_file():
        raise DataFileError(path, "no such file", expected, "Give the path of one.")
    else:
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError, MemoryError, OverflowError, SyntaxError, tokenize.TokenError) as error:
            remedy = "Save the array with numpy.save."
            raise DataFileError(path, f"a file that cannot be read ({error})", expected, remedy) from error
        if not isinstance(array, np.ndarray):
            array.close()
            raise DataFileError(path, "an .npz archive", expected, "Save the array alone, with numpy.save.")
    if array.dtype not in (np.float32, np.float64):
        remedy = "Convert it to its unit, with astype('float32')."
        raise DataFileError(path, f"data type {array.dtype}", expected, remedy)
    if not array.size:
        raise DataFileError(path, f"no numbers, shape {array.shape}", expected, "Give some.")
    return array


def check_finite(array: npt.NDArray[Any], source: Path) -> None:
    """Raise `DataFileError` where a number is NaN or infinite: it would spread over all that the network sees."""
    if not (finite := np.isfinite(array)).all():
        first = tuple(int(index) for index in np.argwhere(~finite)[0])
        found = f"{np.count_nonzero(~finite)} values that are NaN or infinite, the first at {first}"
        raise DataFileError(source, found, "finite numbers", "Interpolate or cut them out.")


def in_batches(network: nn.Module, rows: Tensor, size: int, progress: Progress) -> Tensor:
    """The network's answers to rows, some at a time. Raises `ArtifactError` where it does not take such rows."""
    try:
        return torch.cat([network(batch) for batch in progress(rows.split(size))])
    except (ValueError, RuntimeError) as error:
        shape = tuple(rows.shape[1:])
        raise ArtifactError(f"the network does not take in data of shape {shape}: {error}") from error


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a ``.npy`` file; it is there whole or not at all."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
