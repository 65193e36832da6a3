"""A packed network at work on data of its user: signals of any length, images, measurement vectors.

`apply` takes a file or an array, `apply_file` writes a file, ``pibinn apply`` is its command. What the network takes in
is said by its packed file (``inputs``, which ``convert`` stores); data that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from lightning_modules.apply.arrays import Progress, no_progress, read_array, write_array
from lightning_modules.apply.images import apply_to_image, is_image_file, read_image, write_image
from lightning_modules.apply.measurements import apply_to_blocks, apply_to_vectors
from lightning_modules.apply.signals import apply_to_signals
from lightning_modules.data.files import DataFileError
from pibinn_plugin.errors import ArtifactError
from pibinn_plugin.storage.packed_file import load, read

__all__ = ["apply", "apply_file"]


def apply(
    packed: str | Path,
    data: str | Path | npt.ArrayLike,
    sampling_rate: float | None = None,
    unit: str | None = None,
    allow: Collection[str] = (),
    progress: Progress = no_progress,
) -> npt.NDArray[Any]:
    """What a packed network makes of data.

    Args:
        packed: a file of `pibinn_plugin.save` that says how its network is built and what it takes in.
        data: an array, or a file: ``.npy``, or an image (PNG, JPEG) for a network of images.
        sampling_rate: of a signal, in Hz: has to be that of the network.
        unit: of a signal, such as ``"V"``; that of the network unless given.
        allow: modules whose classes the file may name, see `pibinn_plugin.load`.
        progress: wraps the list of batches, to show how far it is.

    Returns:
        Signals: the shape and unit of the input, cleaned. Images: grey levels in [0, 1], shape (height, width), or
        (images, height, width). Measurement vectors: the unknowns, shape (unknowns,) or (vectors, unknowns).

    Raises:
        ArtifactError: the file does not say how its network is built, or what it takes in.
        DataFileError: the data is not what the network takes in.
        FileNotFoundError: there is no such packed file.

    Example:
        >>> import pibinn_plugin as pb
        >>> from lightning_modules.data.eegdenoisenet import EEGDenoiseNet
        >>> from lightning_modules.solvers.hidden_lista import HiddenLISTA
        >>> solver = pb.convert(pb.prepare(HiddenLISTA(channels=8, layers=2), {"*convolution*.weight": None}))
        >>> path = pb.save(solver, f"{tmp_path}/net.safetensors", inputs=EEGDenoiseNet("folder").inputs)
        >>> apply(path, 20 * torch.randn(2000).numpy(), sampling_rate=256).shape
        (2000,)
    """
    inputs = _checked_inputs(packed)
    kind = inputs["kind"]
    if kind != "signal" and (sampling_rate, unit) != (None, None):
        raise DataFileError(Path(packed), f"a network of kind {kind!r}", "one of signals", "Leave out rate and unit.")
    source = data if isinstance(data, str | Path) else "the array"
    if is_image_file(data) and kind != "image":
        raise DataFileError(Path(str(data)), "an image", f"a .npy array for a network of kind {kind!r}", "Give one.")
    array = read_image(Path(str(data))) if is_image_file(data) else read_array(data)
    network = load(packed, allow=allow)
    with torch.inference_mode():
        if kind == "signal":
            return apply_to_signals(network, array, inputs, sampling_rate, unit, Path(source), progress)
        return _APPLY[kind](network, array, inputs, Path(source), progress)


def _checked_inputs(packed: str | Path) -> dict[str, Any]:
    """What the network of a file takes in. Raises `ArtifactError` where the file does not say it."""
    inputs = dict(read(packed).inputs)
    needed = _INPUTS.get(str(inputs.get("kind")))
    if needed is None:
        raise ArtifactError(
            f"{packed} does not say what its network takes in: convert it with this release, or save it with inputs= "
            f"of kind {', '.join(_INPUTS)}"
        )
    for name, kinds in needed.items():
        value: Any = inputs.get(name)
        if type(value) not in kinds or (type(value) is not str and not value > 0):
            expected = "text" if str in kinds else "a positive number"
            raise ArtifactError(f"{packed}: its inputs have {name}={value!r}; expected {expected}: convert it again")
    return inputs


_INPUTS: dict[str, dict[str, tuple[type, ...]]] = {
    "signal": {"sampling_rate": (float, int), "unit": (str,), "window": (int,), "normalisation": (str,)},
    "image": {},
    "measurements": {"size": (int,), "deviation": (float, int)},
    "blocks": {"size": (int,), "deviation": (float, int)},
}
_APPLY = {"image": apply_to_image, "measurements": apply_to_vectors, "blocks": apply_to_blocks}


def apply_file(
    packed: str | Path,
    data: str | Path,
    output: str | Path,
    sampling_rate: float | None = None,
    unit: str | None = None,
    overwrite: bool = False,
    allow: Collection[str] = (),
    progress: Progress = no_progress,
) -> Path:
    """`apply` from file to file: the output is there whole or not at all, and replaces none without ``overwrite``.

    Args:
        packed: as for `apply`.
        data: as for `apply`.
        output: ``.npy``, or ``.png``, ``.jpg`` where the network gives images.
        sampling_rate: as for `apply`.
        unit: as for `apply`.
        overwrite: whether a file at ``output`` is replaced.
        allow: as for `apply`.
        progress: as for `apply`.

    Returns:
        The output.

    Raises:
        DataFileError: a file lies at ``output``, or its name is of neither kind; or as `apply`.
        ArtifactError, FileNotFoundError: as `apply`.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise DataFileError(output, "a file", "none", "Give --overwrite to replace it, or another name.")
    if not output.parent.is_dir():
        raise DataFileError(output, "no such folder", "a folder that is there", "Make it first.")
    if output.suffix.lower() != ".npy" and not is_image_file(output):
        raise DataFileError(output, f"the suffix {output.suffix!r}", ".npy, .png or .jpg", "Choose one of these.")
    if is_image_file(output) and read(packed).inputs.get("kind") not in ("image", "blocks"):
        raise DataFileError(output, "the name of an image", ".npy: the network gives none", "Choose a name *.npy.")
    result = apply(packed, data, sampling_rate, unit, allow, progress)
    (write_image if is_image_file(output) else write_array)(output, result)
    return output
