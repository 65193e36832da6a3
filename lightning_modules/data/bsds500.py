"""Grey images of the Berkeley Segmentation Data Set (Arbeláez, Maire, Fowlkes and Malik, TPAMI 2011), measured.

A folder holds the 500 images in its own split, `train`, `val` and `test`. The 68 test images of the denoising
literature (Roth and Black, "Fields of Experts", IJCV 2009), called BSD68, are all in `val`. Training uses `train` and
`test`, validation the 32 other images of `val`, and figures are reported on BSD68 alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_modules.block_patterns import PatternOperator
from lightning_modules.data.files import DataFileError
from lightning_modules.data.images import image_paths, read_grey_image
from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader

__all__ = ["BSD68", "BSDS500"]

# Found by comparing the pixels of `val` with the two published copies of BSD68, which agree: Set68 of the code of DnCNN
# (Zhang et al., IEEE TIP 2017; github.com/cszn/DnCNN) and github.com/clausmichele/CBSD68-dataset.
_BSD68_NAMES = (
    "101085 101087 102061 103070 105025 106024 108005 108070 108082 109053 119082 12084 123074 126007 "
    "130026 134035 14037 143090 145086 147091 148026 148089 157055 159008 160068 16077 163085 167062 "
    "167083 170057 175032 175043 182053 189080 19021 196073 197017 208001 210088 21077 216081 219090 "
    "220075 223061 227092 229036 236037 24077 241004 241048 253027 253055 260058 271035 285079 291000 "
    "295087 296007 296059 299086 300091 302008 304034 304074 306005 3096 33039 351093"
)
BSD68 = frozenset(_BSD68_NAMES.split())
GREY_LEVELS = 255
# The noise of the validation and of the test images is the same whatever the seed of the training.
VALIDATION_SEED, TEST_SEED = 20210301, 20210302

Batch = tuple[Tensor, Tensor]


class MeasuredPatches(Dataset[Batch]):
    """Random patches of images, flipped and turned at random, with their measurements.

    Patch, orientation and noise of example `i` of epoch `e`, which has the index `e * len(self) + i`, follow from the
    seed, `e` and `i` alone: neither ranks nor batches nor a resumed run change them.

    Args:
        images: Grey levels, each (height, width) uint8, none smaller than a patch.
        data: What measures them: see `BSDS500.measure`.
        length: Examples an epoch.
    """

    def __init__(self, images: Sequence[Tensor], data: BSDS500, length: int) -> None:
        self.images, self.data, self.length = images, data, length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch (y, x) of examples."""
        draws = [self._random(index) for index in indices]
        x = torch.stack([self._patch(random) for random in draws])
        return self.data.measure(x, draws), x

    def _random(self, index: int) -> np.random.Generator:
        epoch, example = divmod(index, self.length)
        if self.data.calibration_patches is not None:
            epoch, example = 0, example % self.data.calibration_patches
        return np.random.default_rng([self.data.seed, epoch, example])

    def _patch(self, random: np.random.Generator) -> Tensor:
        size = self.data.patch_size
        image = self.images[int(random.integers(len(self.images)))]
        top, left = (int(random.integers(extent - size + 1)) for extent in image.shape)
        patch = image[top : top + size, left : left + size]
        if random.random() < 0.5:
            patch = patch.flip(1)
        return torch.rot90(patch, int(random.integers(4))).unsqueeze(0).float() / GREY_LEVELS


class MeasuredImages(Dataset[Batch]):
    """Whole images with their measurements; the noise of image number i follows from the seed and i.

    Args:
        images: Grey levels, each (height, width) uint8.
        data: What measures them: see `BSDS500.measure`.
        seed: Seed of the noise.
    """

    def __init__(self, images: Sequence[Tensor], data: BSDS500, seed: int) -> None:
        self.images, self.data, self.seed = images, data, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """Return (y, x) of one image, x of shape (1, height, width)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        x = self.images[index][None].float() / GREY_LEVELS
        y = self.data.measure(x[None], [np.random.default_rng([self.seed, index])])
        return y[0], x


class BSDS500(pl.LightningDataModule):
    r"""Measured images: batches `(y, x)` with y = A x + noise and x in [0, 1], shape (batch, 1, height, width).

    Without an operator A is the identity (denoising) and y has the shape of x; with `BlockPatterns` (single-pixel
    imaging) it is (batch, measurements, height / block, width / block). The noise is white, its standard deviation
    `noise_level` / 255. Training batches are random patches, flipped and turned, drawn afresh every epoch from `seed`
    and the epoch index only. Validation (32 images) and test (BSD68) are whole images, one a batch, with fixed noise;
    with an operator they are cut at the bottom and right to whole blocks, which is one row and one column. `setup`
    prints once how many images were read for what, and which files were left out.

    Args:
        data_dir: Folder with the folders `train`, `val` and `test` of JPEG or PNG images, as `image_paths` finds them.
        operator: A; the identity if None.
        noise_level: Standard deviation of the noise, in grey levels of 255.
        patch_size: Height and width of the training patches.
        batch_size: Patches a batch, on each rank.
        train_patches: Patches an epoch.
        calibration_patches: Draw this many patches and their noise once, and train on them only, as where every
            measurement is a measurement of a calibration; None for fresh ones.
        seed: Seed of the training patches and of their noise.

    Raises:
        ValueError: If an argument is out of range.
        DataFileError: By `setup`, if a folder is absent or without an image, if one of BSD68 is not in `val` or is in
            another folder too, if two files of a folder have one stem, or if an image is not what it should be.

    Example:
        >>> from PIL import Image
        >>> for split, names in {"train": "ab", "test": "c", "val": ["d", *BSD68]}.items():
        ...     (tmp_path / split).mkdir()
        ...     for name in names:
        ...         Image.new("L", (24, 20), 128).save(tmp_path / split / f"{name}.png")
        >>> data = BSDS500(tmp_path, patch_size=16, batch_size=4, train_patches=8)
        >>> data.setup()
        >>> y, x = next(iter(data.train_dataloader()))
        >>> y.shape, len(data.val_set), len(data.test_set)
        (torch.Size([4, 1, 16, 16]), 1, 68)
    """

    def __init__(
        self,
        data_dir: str | Path,
        operator: PatternOperator | None = None,
        noise_level: float = 25.0,
        patch_size: int = 64,
        batch_size: int = 8,
        train_patches: int = 8000,
        calibration_patches: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.block_size = 1 if operator is None else operator.block_size
        if not 0 <= noise_level < math.inf or seed < 0:
            raise ValueError(f"noise_level is {noise_level} and seed is {seed}: they must be at least 0, and finite.")
        if min(batch_size, train_patches) < 1 or (calibration_patches is not None and calibration_patches < 1):
            raise ValueError(
                f"batch_size is {batch_size}, train_patches {train_patches}, calibration_patches "
                f"{calibration_patches}: they must be at least 1."
            )
        if calibration_patches is not None and calibration_patches > train_patches:
            raise ValueError(
                f"calibration_patches is {calibration_patches}: it must be at most train_patches, {train_patches}, the "
                f"length of an epoch, or some would never be seen."
            )
        if patch_size < 1 or patch_size % self.block_size:
            raise ValueError(
                f"patch_size is {patch_size}: it must be a positive multiple of the operator's block size, "
                f"{self.block_size}."
            )
        self.data_dir, self.operator, self.noise_level = Path(data_dir), operator, noise_level
        self.patch_size, self.batch_size, self.train_patches = patch_size, batch_size, train_patches
        self.calibration_patches, self.seed = calibration_patches, seed

    @property
    def inputs(self) -> dict[str, str | float]:
        """What a network of this data takes in, for the packed file: images in [0, 1], or measurements of blocks."""
        if self.operator is None:
            return {"kind": "image", "noise_level": float(self.noise_level)}
        grey = torch.rand(4, 1, 8 * self.block_size, 8 * self.block_size, generator=torch.Generator().manual_seed(0))
        deviation = float(self.operator.A(grey).std())
        return {"kind": "blocks", "size": self.operator.shape[0], "deviation": deviation}

    def measure(self, x: Tensor, draws: Sequence[np.random.Generator]) -> Tensor:
        """Measure images x, shape (batch, 1, height, width): A x and, from the generator of each, its noise."""
        y = x if self.operator is None else self.operator.A(x)
        noise = np.stack([random.standard_normal(y.shape[1:], dtype=np.float32) for random in draws])
        return y + self.noise_level / GREY_LEVELS * torch.from_numpy(noise)

    def setup(self, stage: str | None = None) -> None:
        """Read the images, once."""
        if hasattr(self, "train_set"):
            return
        paths, left_out = self._paths()
        train = [self._read(path, self.patch_size) for path in paths["train"] + paths["test"]]
        others = [self._whole_blocks(path) for path in paths["val"] if path.stem not in BSD68]
        test = [self._whole_blocks(path) for path in paths["val"] if path.stem in BSD68]
        if not others:
            found = "no image but those of BSD68"
            raise DataFileError(
                self.data_dir / "val", found, "others to validate on", "Put the data set's `val` there."
            )
        self.train_set = MeasuredPatches(train, self, self.train_patches)
        self.val_set = MeasuredImages(others, self, VALIDATION_SEED)
        self.test_set = MeasuredImages(test, self, TEST_SEED)
        rank_zero_info(
            f"{self.data_dir}: {len(train)} images for training, {len(others)} for validation, {len(test)} (BSD68) for "
            f"test; {len(left_out)} other files{''.join(f', {path}' for path in left_out[:5])}. Noise: "
            f"{self.noise_level:g} of {GREY_LEVELS} grey levels."
        )

    def _paths(self) -> tuple[dict[str, list[Path]], list[Path]]:
        """The images of each folder, with BSD68 in `val` and nowhere else; and the other files."""
        folder, paths, left_out = self.data_dir / "val", {}, []
        found = image_paths(folder)[0] if folder.is_dir() else []
        if missing := sorted(BSD68 - {path.stem for path in found}):
            raise DataFileError(
                folder,
                f"no image named {missing[0]} (of BSD68, {len(missing)} are missing)",
                "the 68 images of BSD68",
                "Put the data set's `val` there.",
            )
        for part in ("train", "val", "test"):
            paths[part], other_files = image_paths(self.data_dir / part)
            left_out += other_files
        for path in paths["train"] + paths["test"]:
            if path.stem in BSD68:
                remedy = "Take it out: figures are reported on it."
                raise DataFileError(path, "an image of BSD68", "other images to train on", remedy)
        return paths, left_out

    def _read(self, path: Path, smallest: int) -> Tensor:
        image = read_grey_image(path)
        if min(image.shape) < smallest:
            found, expected = f"an image of {tuple(image.shape)} pixels", f"at least {smallest} by {smallest}"
            raise DataFileError(path, found, expected, "Lower patch_size, or remove the image.")
        return image

    def _whole_blocks(self, path: Path) -> Tensor:
        image = self._read(path, self.block_size)
        height, width = (extent - extent % self.block_size for extent in image.shape)
        return image[:height, :width]

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of this rank; a last incomplete batch of the epoch is left out."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.train_patches < ranks * self.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size} on {ranks} ranks, but there are {self.train_patches} training "
                "patches an epoch: lower batch_size."
            )
        return ResumableLoader(self.train_set, self.batch_size, EpochSampler(self.train_patches, ranks, rank))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation images, one a batch."""
        return DataLoader(self.val_set, batch_size=1, num_workers=0)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the images of BSD68, one a batch."""
        return DataLoader(self.test_set, batch_size=1, num_workers=0)
