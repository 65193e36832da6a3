"""The patterns of a trained camera as the frames of a micromirror device (DMD): 1-bit PNG files, or packed bits.

A frame shows one pattern: a mirror that is on (1, white) sends its light to the first detector, one that is off (0) to
the second. The measurement of a block of b × b pixels is the difference of the two detectors, divided by b, so that an
entry of the pattern is +1/b where the mirror is on and -1/b where it is off. With one detector, show each frame and its
inverse, and take the difference of the two exposures.

Frames come in the order of the measurements. A pixel of a pattern is a square of `mirrors` × `mirrors` mirrors.

- PNG: ``pattern_000.png``, ..., one a frame, Pillow's mode ``1``, one bit a mirror.
- Packed bits: ``patterns.bin``, frame after frame, in each its rows from top to bottom, in each row 8 mirrors a byte,
  the leftmost in the most significant bit; the last byte of a row is filled up with 0. There is no header: a frame
  takes ``height · ceil(width / 8)`` bytes.

``pibinn frames FILE -o FOLDER`` writes them from a packed file; `mirror_frames` and `save_frames` are its parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

import pibinn_plugin as pb
from lightning_modules.block_patterns import PatternOperator
from lightning_modules.data.files import DataFileError
from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.storage.atomic_file import atomic_file

__all__ = ["main", "mirror_frames", "read_packed_frames", "save_frames"]

Frames = npt.NDArray[np.bool_]

PACKED_NAME = "patterns.bin"


def mirror_frames(patterns: Tensor, mirrors: int = 1) -> Frames:
    """Which mirrors are on in each pattern.

    Args:
        patterns: shape ``(measurements, block²)``, each entry plus or minus one and the same value, such as the
            ``matrix()`` of `lightning_modules.mirror_patterns.MirrorPatterns` with one-bit weights.
        mirrors: mirrors in the side of a pixel.

    Returns:
        Boolean, shape ``(measurements, block · mirrors, block · mirrors)``.

    Raises:
        PIBiNNError: entries of other values, which a mirror cannot show; patterns of blocks that are no square; or
            fewer mirrors than one.

    Example:
        >>> import torch
        >>> mirror_frames(torch.tensor([[0.5, -0.5, -0.5, 0.5]])).astype(int)
        array([[[1, 0],
                [0, 1]]])
    """
    if mirrors < 1:
        raise PIBiNNError(f"mirrors={mirrors}: a pixel has at least one mirror")
    values = patterns.detach().cpu().numpy()
    block = round(values.shape[-1] ** 0.5) if values.ndim == 2 else 0
    if not values.size or block**2 != values.shape[-1]:
        raise PIBiNNError(f"the patterns have shape {tuple(values.shape)}: it must be (measurements, block²)")
    if not values[0, 0] or not (np.abs(values) == np.abs(values[0, 0])).all():
        raise PIBiNNError(
            f"the patterns have entries of magnitude {np.abs(values).min():.3g} to {np.abs(values).max():.3g}: mirrors "
            f"show one magnitude; train one-bit patterns, or round these to their signs"
        )
    frames = (values > 0).reshape(-1, block, block)
    return frames.repeat(mirrors, axis=1).repeat(mirrors, axis=2)


def save_frames(
    frames: Frames, folder: str | Path, format: Literal["png", "bits"] = "png", overwrite: bool = False
) -> list[Path]:
    r"""Write frames into a folder, which is made where it is not there.

    Args:
        frames: boolean, shape ``(frames, height, width)``, True where a mirror is on.
        folder: of the files.
        format: ``png`` for a file a frame, ``bits`` for one file of packed bits.
        overwrite: replace files that are there.

    Returns:
        The files, in the order of the frames.

    Raises:
        FileExistsError: there is such a file, and ``overwrite`` is not set.

    Example:
        >>> frames = np.array([[[True, False], [True, True]]])
        >>> [path.name for path in save_frames(frames, f"{tmp_path}")]
        ['pattern_000.png']
        >>> save_frames(frames, f"{tmp_path}", "bits")[0].read_bytes()
        b'\x80\xc0'
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "bits":
        paths = [folder / PACKED_NAME]
    else:
        paths = [folder / f"pattern_{number:03}.png" for number in range(len(frames))]
    if there := [path for path in paths if path.exists() and not overwrite]:
        raise FileExistsError(f"{there[0]} is there already: choose another folder, or replace it with overwrite")
    if format == "bits":
        with atomic_file(paths[0]) as partial:
            partial.write_bytes(np.packbits(frames, axis=2).tobytes())
    else:
        for path, frame in zip(paths, frames, strict=True):
            with atomic_file(path) as partial:
                Image.fromarray(frame).save(partial, format="PNG")
    return paths


def read_packed_frames(path: str | Path, height: int, width: int) -> Frames:
    """Read a file of packed bits.

    Args:
        path: of a file that `save_frames` wrote with ``bits``.
        height: of a frame, in mirrors.
        width: of a frame, in mirrors.

    Returns:
        Boolean, shape ``(frames, height, width)``.

    Raises:
        DataFileError: the file does not hold whole frames of that size.
        FileNotFoundError: there is no such file.

    Example:
        >>> path = save_frames(np.array([[[True, False], [True, True]]]), f"{tmp_path}/frames", "bits")[0]
        >>> read_packed_frames(path, height=2, width=2).tolist()
        [[[True, False], [True, True]]]
    """
    data, row = np.frombuffer(Path(path).read_bytes(), np.uint8), -(-width // 8)
    if min(height, width) < 1 or not data.size or data.size % (height * row):
        expected = f"a multiple of {height * row}, for frames of {height} × {width} mirrors"
        raise DataFileError(Path(path), f"{data.size} bytes", expected, "Give the size it was written with.")
    bits = np.unpackbits(data.reshape(-1, height, row), axis=2, count=width)
    return bits.astype(np.bool_)


def _patterns_in(network: Any, path: Path) -> Tensor:
    operators = [module for module in network.modules() if isinstance(module, PatternOperator)]
    if len(operators) != 1:
        raise PIBiNNError(
            f"{path} holds a {type(network).__name__} with {len(operators)} sets of patterns; frames are those of one, "
            f"as of a SinglePixelCamera"
        )
    return operators[0].matrix()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pibinn frames",
        description="Write the patterns of a packed camera as the frames of a micromirror device. 1, white: a mirror "
        "is on, its light counts +1; 0, black: off, -1.",
        allow_abbrev=False,
    )
    parser.add_argument("packed", type=Path, metavar="FILE", help="the packed network, of convert or pb.save")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="of the frames")
    parser.add_argument(
        "--format",
        choices=("png", "bits"),
        default="png",
        help=f"png: a 1-bit PNG a frame; bits: all in {PACKED_NAME}, rows of 8 mirrors a byte, the leftmost in the "
        f"most significant bit (png)",
    )
    parser.add_argument("--mirrors", type=int, default=1, help="mirrors in the side of a pixel of a pattern (1)")
    parser.add_argument("--overwrite", action="store_true", help="replace frames that are there")
    parser.add_argument(
        "--allow", nargs="+", default=(), metavar="MODULE", help="modules whose classes the file may name"
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        PIBiNNError, FileExistsError, FileNotFoundError: as `mirror_frames`, `save_frames` and `pibinn_plugin.load`.
    """
    given = _parser().parse_args(list(args))
    patterns = _patterns_in(pb.load(given.packed, allow=given.allow), given.packed)
    frames = mirror_frames(patterns, given.mirrors)
    paths = save_frames(frames, given.output, given.format, given.overwrite)
    count, height, width = frames.shape
    print(f"{count} frames of {height} × {width} mirrors: {paths[0]}{f' ... {paths[-1].name}' if paths[1:] else ''}")
