"""Which files of a folder are images: none is passed over, read twice or read for something else."""

import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lightning_modules.data.bsds500 import BSD68, BSDS500
from lightning_modules.data.files import DataFileError
from lightning_modules.data.images import image_paths, read_grey_image

FIRST = min(BSD68)


def write_image(path, level, kind=None):
    Image.new("L", (16, 16), level).save(path, kind)


@pytest.fixture
def folder(tmp_path):
    """Two images in train and in test, one of them in capitals, and BSD68 and two others in val."""
    for part, names in (("train", "ab"), ("test", "cd"), ("val", ["e", "f", *sorted(BSD68)])):
        (tmp_path / part).mkdir()
        for number, name in enumerate(names):
            write_image(tmp_path / part / f"{name}.png", number)
    return tmp_path


def loaded(folder):
    data = BSDS500(folder, patch_size=8, batch_size=2, train_patches=4)
    data.setup()
    return data


def counts(folder):
    data = loaded(folder)
    return len(data.train_set.images), len(data.val_set), len(data.test_set)


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "Jpg", "jpeg", "JPEG", "png", "PNG", "pNg"])
def test_images_are_images_in_any_case(folder, suffix):
    kind = "PNG" if suffix.lower() == "png" else "JPEG"
    for part, name in (("train", "more"), ("test", "another"), ("val", "third")):
        write_image(folder / part / f"{name}.{suffix}", 200, kind)
    (folder / "val" / f"{FIRST}.png").unlink()
    write_image(folder / "val" / f"{FIRST}.{suffix}", 200, kind)
    assert counts(folder) == (6, 3, 68)


@pytest.mark.parametrize("part", ["train", "test", "val"])
def test_a_missing_or_empty_folder_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(DataFileError, match=rf"{part}: found no (such folder|image named {FIRST})"):
        loaded(folder)
    (folder / part).mkdir()
    with pytest.raises(DataFileError, match=rf"{part}: found no image"):
        loaded(folder)
    (folder / part).rmdir()
    (folder / part).write_text("no folder")
    with pytest.raises(DataFileError, match=rf"{part}: found no (such folder|image named {FIRST})"):
        loaded(folder)


def test_one_missing_image_of_bsd68_is_named(folder):
    (folder / "val" / f"{FIRST}.png").rename(folder / "val" / f"{FIRST}x.png")
    with pytest.raises(DataFileError, match=rf"val: found no image named {FIRST} \(of BSD68, 1 are missing\)"):
        loaded(folder)


def test_val_of_bsd68_alone_leaves_nothing_to_validate_on(folder):
    for name in "ef":
        (folder / "val" / f"{name}.png").unlink()
    with pytest.raises(DataFileError, match="val: found no image but those of BSD68"):
        loaded(folder)


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_that_figures_are_reported_on_is_none_to_train_on(folder, part):
    shutil.copy(folder / "val" / f"{FIRST}.png", folder / part)
    with pytest.raises(DataFileError, match=rf"{part}/{FIRST}\.png: found an image of BSD68"):
        loaded(folder)


@pytest.mark.parametrize(
    ("part", "stem", "suffixes"),
    [
        ("val", FIRST, ("jpg", "png")),
        ("train", "a", ("JPG", "png")),
        ("test", "c", ("PNG", "png")),
        ("val", "e", ("jpeg", "png")),
    ],
)
def test_two_files_of_one_stem_are_named(folder, part, stem, suffixes):
    write_image(folder / part / f"{stem}.{suffixes[0]}", 200, "JPEG")
    with pytest.raises(
        DataFileError, match=rf"{part}: found {stem}\.{suffixes[0]} and {stem}\.{suffixes[1]}; expected one"
    ):
        loaded(folder)


@pytest.mark.parametrize(
    "name",
    ["x.bmp", "x.tif", "x.TIFF", "x.gif", "x.webp", "x.jpe", "x.ppm", "x", "x.jpg.bak", "x.jpg ", "x.txt", "101085"],
)
def test_an_image_under_another_name_or_format_is_refused(folder, name):
    kinds = {"bmp": "BMP", "tif": "TIFF", "TIFF": "TIFF", "gif": "GIF", "webp": "WEBP", "ppm": "PPM"}
    write_image(folder / "train" / name, 3, kinds.get(name.split(".")[-1], "JPEG"))
    with pytest.raises(DataFileError, match=rf"train: found {name}, an image of another format or name"):
        loaded(folder)


def test_an_image_suffix_is_enough_whatever_the_content(folder):
    (folder / "test" / "broken.tif").write_bytes(b"cut")
    with pytest.raises(DataFileError, match=r"test: found broken\.tif"):
        loaded(folder)
    (folder / "test" / "broken.tif").rename(folder / "test" / "broken.jpg")
    with pytest.raises(DataFileError, match=r"broken\.jpg: found a file that cannot be read"):
        loaded(folder)


@pytest.mark.parametrize("name", ["more", "1.jpg"])
def test_a_folder_of_images_in_the_folder_is_refused(folder, name):
    (folder / "train" / name).mkdir()
    with pytest.raises(DataFileError, match=name):
        loaded(folder)


def test_hidden_files_and_files_that_are_no_images_are_left_out_and_said(folder, caplog):
    caplog.set_level("INFO")
    (folder / "train" / "README.txt").write_text("Berkeley")
    (folder / "train" / "._a.jpg").write_bytes(b"what a Mac puts beside a.jpg")
    (folder / "val" / "Thumbs.db").write_bytes(bytes(range(256)))
    (folder / "val" / ".hidden").mkdir()
    assert counts(folder) == (4, 2, 68)
    (message,) = {record.getMessage() for record in caplog.records}
    assert message == (
        f"{folder}: 4 images for training, 2 for validation, 68 (BSD68) for test; 4 other files, "
        f"{folder}/train/._a.jpg, {folder}/train/README.txt, {folder}/val/.hidden, {folder}/val/Thumbs.db. "
        f"Noise: 25 of 255 grey levels."
    )


def test_what_was_read_is_printed_once(folder, caplog):
    caplog.set_level("INFO")
    data = loaded(folder)
    data.setup("test")
    assert len(caplog.records) == 1


def test_images_come_in_the_order_of_their_names(folder):
    write_image(folder / "train" / "0.JPEG", 9, "JPEG")
    images, others = image_paths(folder / "train")
    assert [path.name for path in images] == ["0.JPEG", "a.png", "b.png"]
    assert others == []


def png_of_16_bits(colour_type, channels):
    """A PNG file of 2 x 2 pixels and 16 bits a channel, written by hand."""
    rows = b"".join(b"\0" + np.full(2 * channels, 0x1234, ">u2").tobytes() for _ in range(2))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_more_than_8_bits_a_channel_are_refused(tmp_path, colour_type, channels):
    path = tmp_path / "deep.png"
    path.write_bytes(png_of_16_bits(colour_type, channels))
    with pytest.raises(DataFileError, match=r"deep\.png: found mode .*expected .* 8 bits a channel"):
        read_grey_image(path)


@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF", "WEBP"])
def test_other_formats_under_the_name_of_an_image_are_refused(tmp_path, format):
    path = tmp_path / "image.png"
    Image.new("RGB" if format == "WEBP" else "L", (4, 4)).save(path, format)
    with pytest.raises(DataFileError, match=f"(format {format}|mode P)"):
        read_grey_image(path)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "F"])
def test_other_modes_are_refused(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.tif" if mode == "F" else "image.png")
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(DataFileError, match=f"found mode {mode}"):
        read_grey_image(path)
