"""The structures that ``structure_from_operator`` reads off the linear physics of deepinv, on images of 16 × 16.

``pip install deepinv`` beside the torch that is there (``-c constraints.txt``), then
``.venv/bin/python benchmarks/structures_of_physics.py``; ten seconds. Writes
``benchmarks/results/structures_of_physics.md``.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepinv
import torch
from deepinv import physics
from deepinv.physics.functional.blur import gaussian_blur

from lightning_modules.operators import CircularConvolution, FlattenedPhysics
from pibinn_plugin.structure import Structure, structure_from_operator
from pibinn_plugin.structure.operator_support import operator_support

RESULTS = Path(__file__).parent / "results" / "structures_of_physics.md"
IMAGE = (1, 16, 16)
COLOURS = (3, 16, 16)
COMPLEX = (2, 16, 16)


def gaussian(*deviations: float, angle: float = 0.0) -> torch.Tensor:
    """A Gaussian kernel of these standard deviations in pixels, turned by an angle in degrees."""
    return gaussian_blur(sigma=deviations, angle=angle)


# What it is, the shape of an unknown, and how it is made.
PHYSICS: list[tuple[str, tuple[int, ...], Callable[[], Any]]] = [
    ("Denoising", IMAGE, lambda: physics.Denoising()),
    ("Inpainting, half of the pixels", IMAGE, lambda: physics.Inpainting(IMAGE, mask=0.5)),
    ("Demosaicing", COLOURS, lambda: physics.Demosaicing(img_size=COLOURS)),
    ("Decolorize", COLOURS, lambda: physics.Decolorize()),
    ("Blur, Gaussian of 0.4, circular", IMAGE, lambda: physics.Blur(gaussian(0.4, 0.4), padding="circular")),
    ("Blur, Gaussian of 1, circular", IMAGE, lambda: physics.Blur(gaussian(1.0, 1.0), padding="circular")),
    ("Blur, Gaussian of 1, valid", IMAGE, lambda: physics.Blur(gaussian(1.0, 1.0), padding="valid")),
    ("BlurFFT, Gaussian of 0.4", IMAGE, lambda: physics.BlurFFT(IMAGE, gaussian(0.4, 0.4))),
    ("BlurFFT, Gaussian of 1", IMAGE, lambda: physics.BlurFFT(IMAGE, gaussian(1.0, 1.0))),
    ("BlurFFT, Gaussian of 2 by 1, turned", IMAGE, lambda: physics.BlurFFT(IMAGE, gaussian(2.0, 1.0, angle=30.0))),
    ("Downsampling by 2, bicubic", IMAGE, lambda: physics.Downsampling(img_size=IMAGE, filter="bicubic", factor=2)),
    ("Tomography, 8 angles", IMAGE, lambda: physics.Tomography(angles=8, img_width=16, normalize=True)),
    ("Tomography, 16 angles", IMAGE, lambda: physics.Tomography(angles=16, img_width=16, normalize=True)),
    ("CompressedSensing, Gaussian", IMAGE, lambda: physics.CompressedSensing(m=64, img_size=IMAGE)),
    ("SinglePixelCamera, Hadamard", IMAGE, lambda: physics.SinglePixelCamera(m=64, img_size=IMAGE, fast=True)),
    ("StructuredRandom, Hadamard", IMAGE, lambda: physics.StructuredRandom(IMAGE, IMAGE)),
    ("MRI, all frequencies", COMPLEX, lambda: physics.MRI(img_size=COMPLEX)),
    ("CircularConvolution of this package, 3 taps", (64,), lambda: CircularConvolution([0.25, 0.5, 0.25], [64])),
]


def described(structure: Structure, shape: tuple[int, int]) -> str:
    """The kind, and of blocks their number and whether they are permuted, of masks the encoding."""
    fields = {"blocks": "", "row_order": "permuted", "lower": "below", "upper": "above", "encoding": ""}
    words = [structure.kind.replace("_", "-")]
    for name, word in fields.items():
        if (value := getattr(structure, name, None)) is not None:
            words.append(word if name == "row_order" else f"{value} {word}".strip())
    return ", ".join(words)


def row(name: str, unknown_shape: tuple[int, ...], make: Callable[[], Any]) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    operator = FlattenedPhysics(make(), unknown_shape)
    rows, columns = operator.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        support, structure = operator_support(operator), structure_from_operator(operator)
    nonzeros = len(support.row_index) + support.dropped
    report = f"{support.dropped:,} | {support.largest_dropped:.1e}" if support.dropped else "0 | "
    return (
        f"| {name} | {rows} × {columns} | {nonzeros:,} | {report} | {support.smallest_kept:.1e} | "
        f"{described(structure, operator.shape)} | {structure.nnz(operator.shape):,} | {len(structure.to_bytes()):,} |"
    )


def main() -> None:
    """Write the table."""
    lines = [
        "# Structures of physics: deepinv's linear operators on images of 16 × 16",
        "",
        f"`python benchmarks/structures_of_physics.py`. deepinv {deepinv.__version__}, torch {torch.__version__}, "
        f"float32, on the CPU. Entries that are taken for rounding count as zero; the largest of them and the smallest "
        f"that is kept are given as they are.",
        "",
        "| physics | m × n | not 0 | taken for rounding | up to | smallest kept | structure | nonzeros | bytes |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(*arguments) for arguments in PHYSICS),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
