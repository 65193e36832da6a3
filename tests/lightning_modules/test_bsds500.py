"""The images: grey conversion, the split, draws that depend on seed and epoch only, measurements, damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.data.bsds500 import BSD68, BSDS500
from lightning_modules.data.files import DataFileError
from lightning_modules.data.images import read_grey_image
from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader

REAL = Path(__file__).parents[3] / "shared" / "data" / "bsds500"


def write_noise(path, height, width, seed):
    """A grey image of independent pixels: two patches are alike only if they are of the same place."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five training images of both orientations, BSD68, and three other images of val."""
    root = tmp_path_factory.mktemp("bsds")
    names = [("train", "1"), ("train", "2"), ("train", "3"), ("test", "4"), ("test", "5")]
    names += [("val", name) for name in ["8023", *sorted(BSD68), "85048", "97033"]]
    for number, (part, name) in enumerate(names):
        (root / part).mkdir(exist_ok=True)
        write_noise(root / part / f"{name}.png", *((33, 49) if number % 2 else (49, 33)), number)
    return root


def loaded(folder, **arguments):
    data = BSDS500(folder, **{"batch_size": 4, "patch_size": 16, "train_patches": 12, **arguments})
    data.setup()
    return data


def batches(data, epoch, ranks=1, rank=0):
    sampler = EpochSampler(len(data.train_set), ranks, rank)
    sampler.set_epoch(epoch)
    return list(ResumableLoader(data.train_set, data.batch_size, sampler))


def equal(first, second):
    return all(torch.equal(a, b) for p, q in zip(first, second, strict=True) for a, b in zip(p, q, strict=True))


# Grey levels


@settings(max_examples=30, deadline=None)
@given(colour=st.tuples(*[st.integers(0, 255)] * 3))
def test_grey_is_the_luma_of_itu_r_601(tmp_path_factory, colour):
    path = tmp_path_factory.mktemp("colour") / "image.png"
    Image.new("RGB", (3, 2), colour).save(path)
    grey = read_grey_image(path)
    assert grey.shape == (2, 3) and grey.dtype == torch.uint8
    assert abs(int(grey[0, 0]) - (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])) < 0.51


def test_grey_files_are_read_as_they_are(folder):
    expected = np.array(Image.open(folder / "train" / "2.png"))
    np.testing.assert_array_equal(read_grey_image(folder / "train" / "2.png").numpy(), expected)


# Split


def test_parts_are_whole_folders_and_bsd68(folder):
    data = loaded(folder)
    paths = {part: sorted((folder / part).glob("*")) for part in ("train", "test", "val")}
    reported = [path for path in paths["val"] if path.stem in BSD68]
    others = [path for path in paths["val"] if path.stem not in BSD68]
    assert (len(reported), len(others)) == (68, 3)
    for images, files in (
        (data.train_set.images, paths["train"] + paths["test"]),
        (data.val_set.images, others),
        (data.test_set.images, reported),
    ):
        assert len(images) == len(files)
        assert all(torch.equal(image, read_grey_image(path)) for image, path in zip(images, files, strict=True))


@pytest.mark.skipif(not REAL.is_dir(), reason="the images of BSDS500 are not there")
def test_real_split_has_no_image_twice():
    folders = {part: {path.stem for path in (REAL / part).glob("*.jpg")} for part in ("train", "val", "test")}
    assert {part: len(names) for part, names in folders.items()} == {"train": 200, "val": 100, "test": 200}
    assert folders["val"] >= BSD68
    assert len(set.union(*folders.values())) == 500
    assert len(BSD68) == 68


# Draws


def test_training_patches_are_patches_of_training_images(folder):
    data = loaded(folder)
    for image in (batch[1][0, 0] for batch in batches(data, 0)):
        patch = (image * 255).round().to(torch.uint8)
        ways = [torch.rot90(side, turns) for side in (patch, patch.flip(1)) for turns in range(4)]
        rows = {tuple(way[0].tolist()) for way in ways}
        windows = (source.unfold(1, 16, 1) for source in data.train_set.images)
        assert any(tuple(row) in rows for window in windows for row in window.flatten(0, 1).tolist())


def test_draws_depend_on_seed_and_epoch_only(folder):
    data = loaded(folder, seed=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = batches(data, epoch=5)
    assert torch.equal(torch.get_rng_state(), before)
    batches(data, epoch=0)
    np.random.seed(1)
    assert equal(first, batches(data, epoch=5)) and equal(first, batches(loaded(folder, seed=3), epoch=5))
    assert not torch.equal(first[0][0], batches(data, epoch=6)[0][0])
    assert not torch.equal(first[0][0], batches(loaded(folder, seed=4), epoch=5)[0][0])


def test_ranks_together_see_the_batches_of_one_rank(folder):
    whole = batches(loaded(folder, batch_size=4), epoch=2)
    parts = [batches(loaded(folder, batch_size=2), 2, ranks=2, rank=rank) for rank in range(2)]
    for step, batch in enumerate(whole):
        for rank in range(2):
            assert equal([parts[rank][step]], [[side[rank::2] for side in batch]])


def test_a_resumed_epoch_goes_on_with_its_next_batch(folder):
    data = loaded(folder)
    whole = batches(data, epoch=1)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    loader.load_state_dict({"epoch": 1, "batches": 2})
    assert equal(list(loader), whole[2:])


def test_calibration_patches_are_the_same_in_every_epoch(folder):
    data = loaded(folder, calibration_patches=6)
    (first, second, third), later = batches(data, epoch=0), batches(data, epoch=9)
    assert equal([first, second, third], later)
    distinct = torch.cat([batch[0] for batch in later]).flatten(1).unique(dim=0)
    assert len(distinct) == 6


@pytest.mark.parametrize("part", ["val", "test"])
def test_evaluation_noise_is_fixed_and_of_the_given_level(folder, part):
    first, second = (list(getattr(loaded(folder, seed=seed), f"{part}_dataloader")()) for seed in (0, 1))
    assert equal(first, second)
    noise = torch.cat([(y - x).flatten() for y, x in first])
    assert float(noise.std()) == pytest.approx(25 / 255, rel=0.05)
    assert len({float(y.sum()) for y, _ in first}) == len(first)


# Measurements


def test_measurements_are_those_of_the_operator_with_whole_blocks(folder):
    operator = BlockPatterns(block_size=8, measurements=16)
    data = loaded(folder, operator=operator, noise_level=0.0)
    for y, x in [*data.train_dataloader(), *data.test_dataloader()]:
        assert x.shape[2] % 8 == x.shape[3] % 8 == 0
        blocks = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
        expected = torch.einsum("mp,bchwp->bmhw", operator.patterns, blocks)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    assert {tuple(x.shape[2:]) for _, x in data.test_dataloader()} == {(32, 48), (48, 32)}


def test_pixels_are_in_unit_range(folder):
    data = loaded(folder)
    for _, x in [*data.train_dataloader(), *data.val_dataloader()]:
        assert x.dtype == torch.float32 and float(x.min()) >= 0 and 0.9 < float(x.max()) <= 1


# Arguments and files


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"noise_level": -1.0}, "noise_level is -1"),
        ({"noise_level": float("nan")}, "noise_level is nan"),
        ({"noise_level": float("inf")}, "noise_level is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"calibration_patches": 0}, "calibration_patches 0"),
        ({"patch_size": 20, "operator": BlockPatterns(16, 4)}, "patch_size is 20"),
    ],
)
def test_unfit_arguments_are_refused_and_named(tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        BSDS500(tmp_path, **arguments)


def test_a_batch_larger_than_the_epoch_is_refused(folder):
    with pytest.raises(ValueError, match="lower batch_size"):
        loaded(folder, batch_size=13).train_dataloader()


def test_absent_images_are_named(tmp_path):
    with pytest.raises(DataFileError, match=r"val: found no image named 101085 \(of BSD68, 68 are missing\)"):
        loaded(tmp_path)


def test_a_patch_larger_than_an_image_is_refused(folder):
    with pytest.raises(DataFileError, match=r"1\.png: found an image of \(49, 33\) pixels; expected at least 40"):
        loaded(folder, patch_size=40)


@pytest.mark.parametrize("content", [b"", b"no image", "truncated", "16 bits", "absent"])
def test_a_bad_image_is_refused_and_named(tmp_path, content):
    path = tmp_path / "bad.png"
    if content == "16 bits":
        Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(path)
    elif content == "truncated":
        write_noise(path, 40, 40, 0)
        path.write_bytes(path.read_bytes()[:300])
    elif content != "absent":
        path.write_bytes(content)
    with pytest.raises(DataFileError, match=r"bad\.png: found .*; expected a JPEG or PNG"):
        read_grey_image(path)
