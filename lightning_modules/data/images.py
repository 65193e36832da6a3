"""Reading of image files: which files of a folder are images, and their grey levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_modules.data.files import DataFileError

__all__ = ["image_paths", "read_grey_image"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "MPO", "PNG")  # MPO: a JPEG with a preview behind it, of many cameras


def image_paths(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Find the images of a folder: its files `*.jpg`, `*.jpeg` and `*.png`, in any case.

    Hidden files, whose name begins with a dot, are left out, and so are files that are no images by their name and by
    their content, such as `README.txt`. Nothing else is: an image of another format, one under another name and a
    folder in the folder are errors.

    Args:
        folder: The folder.

    Returns:
        The images, sorted by name, at least one; and the files that were left out.

    Raises:
        DataFileError: If the folder is absent or without an image, if two images have one stem, or if there is an image
            of another format or name, or a folder.

    Example:
        >>> from PIL import Image
        >>> Image.new("L", (4, 2)).save(f"{tmp_path}/1.PNG")
        >>> _ = Path(f"{tmp_path}/notes.txt").write_text("grey")
        >>> [[path.name for path in paths] for paths in image_paths(tmp_path)]
        [['1.PNG'], ['notes.txt']]
    """
    folder = Path(folder)
    expected = "a folder of JPEG or PNG images"
    if not folder.is_dir():
        raise DataFileError(folder, "no such folder", expected, "Put it there or point data_dir at the data set.")
    images: dict[str, Path] = {}
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if (other := images.setdefault(path.stem, path)) != path:
                found = f"{other.name} and {path.name}"
                raise DataFileError(folder, found, "one file of each stem", "Take one of the two out.")
        elif path.name.startswith(".") or _is_no_image(path):
            left_out.append(path)
        else:
            found = f"{path.name}, {'an image of another format or name' if path.is_file() else 'no file'}"
            remedy = "Convert it to JPEG or PNG under a name *.jpg, *.jpeg or *.png, or take it out."
            raise DataFileError(folder, found, expected, remedy)
    if not images:
        raise DataFileError(folder, "no images", expected, "Put them there or point data_dir at the data set.")
    return sorted(images.values()), left_out


def _is_no_image(path: Path) -> bool:
    """Whether a file has neither a suffix nor a content that Pillow knows as that of an image."""
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    if not path.is_file() or path.suffix.lower() in suffixes:
        return False
    try:
        Image.open(path).close()
    except OSError:
        return True
    except Image.DecompressionBombError:
        return False
    return False


def read_grey_image(path: str | Path) -> Tensor:
    """Read an image as grey levels 0 ... 255, colours by ITU-R 601: 0.299 R + 0.587 G + 0.114 B, rounded.

    Args:
        path: A JPEG or PNG file of 8 bits a channel, grey or colour.

    Returns:
        Shape (height, width), uint8.

    Raises:
        DataFileError: If the file is absent, damaged, of another format whatever its name, or neither grey nor RGB.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (4, 2), (255, 0, 0)).save(f"{tmp_path}/red.png")
        >>> read_grey_image(f"{tmp_path}/red.png").unique()
        tensor([76], dtype=torch.uint8)
    """
    from PIL import Image

    path, expected = Path(path), "a JPEG or PNG image, grey or RGB, 8 bits a channel"
    try:
        with Image.open(path) as image:
            # Of colours with 16 bits a channel Pillow reads 8 as RGB: the mode of the file's own bytes tells.
            of_file = next((str(tile[3]) for tile in image.tile if ";16" in str(tile[3])), image.mode)
            if of_file not in ("L", "RGB"):
                raise DataFileError(path, f"mode {of_file}", expected, "Convert the image to grey or RGB of 8 bits.")
            if image.format not in FORMATS:
                raise DataFileError(path, f"an image of format {image.format}", expected, "Convert the image.")
            return torch.from_numpy(np.array(image.convert("L")))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        found = "no such file" if not path.is_file() else f"a file that cannot be read ({error})"
        raise DataFileError(path, found, expected, "Replace the file with an intact copy.") from error
