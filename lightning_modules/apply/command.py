"""``pibinn apply FILE DATA -o OUTPUT``: a packed network at work on a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_modules.apply import apply_file

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pibinn apply",
        description="Apply a packed network to a signal, an image or measurements. What it takes in, its file says.",
        allow_abbrev=False,
    )
    parser.add_argument("packed", type=Path, metavar="FILE", help="the packed network, of convert or pb.save")
    parser.add_argument("data", type=Path, metavar="DATA", help="a .npy array, or a PNG or JPEG image")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="a .npy array; or .png, .jpg where the network gives images"
    )
    parser.add_argument("--sampling_rate", type=float, metavar="HZ", help="of a signal; has to be the network's")
    parser.add_argument("--unit", help="of a signal: V, mV, µV or nV (that of the network)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it is there")
    parser.add_argument(
        "--allow", nargs="+", default=(), metavar="MODULE", help="modules whose classes the file may name"
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ArtifactError, DataFileError, FileNotFoundError: as `apply_file`.
    """
    given = _parser().parse_args(list(args))
    path = apply_file(
        given.packed,
        given.data,
        given.output,
        given.sampling_rate,
        given.unit,
        given.overwrite,
        given.allow,
        _shown,
    )
    print(f"output: {path}")


def _shown(batches: Sequence[Tensor]) -> Iterable[Tensor]:
    return track(batches, description="apply", console=Console(stderr=True), transient=True)
