"""Scenes: pixels as they are, and noise of the detectors that follows from the seed and the place alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_modules.data.bsds500 import BSD68
from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader
from lightning_modules.data.scenes import BSDS500Scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bsds")
    for number, (part, name) in enumerate([("train", "1"), ("test", "2"), ("val", "3"), *(("val", n) for n in BSD68)]):
        (root / part).mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (25, 33), dtype=np.uint8)
        Image.fromarray(pixels).save(root / part / f"{name}.png")
    return root


def loaded(folder, **arguments):
    sizes = {"block_size": 8, "measurements": 12, "patch_size": 16, "batch_size": 4, "train_patches": 12}
    data = BSDS500Scenes(folder, **sizes | arguments)
    data.setup()
    return data


def batches(data, epoch):
    sampler = EpochSampler(len(data.train_set))
    sampler.set_epoch(epoch)
    return list(ResumableLoader(data.train_set, data.batch_size, sampler))


def test_a_scene_holds_the_pixels_and_noise_of_its_level(folder):
    data = loaded(folder, noise_level=10.0)
    scene, x = next(iter(data.test_dataloader()))
    assert x.shape == (1, 1, 24, 32) and scene.shape == (1, 64 + 12, 3, 4)
    assert torch.equal(F.pixel_shuffle(scene[:, :64], 8), x)
    noise = torch.cat([scene[:, 64:].flatten() for scene, _ in data.test_dataloader()])
    assert noise.std() == pytest.approx(10 / 255, rel=0.05) and noise.mean().abs() < 0.002
    assert loaded(folder, noise_level=0.0).test_set[0][0][64:].abs().max() == 0


def test_draws_depend_on_seed_and_epoch_only(folder):
    first, again, other = (batches(loaded(folder, seed=seed), 0) for seed in (0, 0, 1))
    for (scene, x), (scene_again, x_again) in zip(first, again, strict=True):
        assert torch.equal(scene, scene_again) and torch.equal(x, x_again)
    assert not torch.equal(first[0][0][:, 64:], other[0][0][:, 64:])
    assert not torch.equal(first[0][0][:, 64:], batches(loaded(folder), 1)[0][0][:, 64:])


def test_a_run_stopped_within_an_epoch_sees_the_same_noise(folder):
    data = loaded(folder)
    data.trainer = None
    whole = list(data.train_dataloader())
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 1})
    rest = list(loader)
    assert len(rest) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[1:], rest, strict=True))


def test_the_noise_of_evaluation_is_fixed(folder):
    a, b = loaded(folder, seed=0), loaded(folder, seed=5)
    assert torch.equal(a.test_set[3][0], b.test_set[3][0])
    assert not torch.equal(a.test_set[3][0][64:], a.test_set[4][0][64:])


def test_inputs_are_the_measurements_of_the_device(folder):
    inputs = loaded(folder).inputs
    assert inputs["kind"] == "blocks" and inputs["size"] == 12 and inputs["deviation"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"measurements": 65}, "measurements=65"),
        ({"patch_size": 20}, "patch_size is 20: .* multiple of the operator's block size, 8"),
        ({"noise_level": -1.0}, "noise_level is -1.0"),
    ],
)
def test_unfit_arguments_are_refused(folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        loaded(folder, **arguments)
