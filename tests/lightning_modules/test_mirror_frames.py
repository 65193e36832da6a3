"""Frames of a micromirror device: read back bit for bit, by Pillow and by a reader of the documented layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import pibinn_plugin as pb
from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.cli import main
from lightning_modules.data.files import DataFileError
from lightning_modules.mirror_frames import mirror_frames, read_packed_frames, save_frames
from lightning_modules.mirror_patterns import MirrorPatterns
from lightning_modules.solvers.single_pixel_camera import SinglePixelCamera
from lightning_modules.solvers.support_lista import SupportLISTA

FRAMES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 19)).flatmap(lambda size: arrays(bool, size))


def test_a_mirror_is_on_where_the_pattern_is_positive():
    patterns = BlockPatterns(block_size=4, measurements=5).matrix()
    frames = mirror_frames(patterns)
    signed = torch.from_numpy(2.0 * frames - 1.0).float().flatten(1)
    assert torch.equal(signed / 4, patterns)


def test_the_difference_of_the_detectors_is_the_measurement():
    operator, x = BlockPatterns(block_size=4, measurements=5), torch.rand(1, 1, 4, 4)
    light, frames = x[0, 0].numpy(), mirror_frames(operator.matrix())
    on, off = ((light * mirrors).sum((1, 2)) for mirrors in (frames, ~frames))
    np.testing.assert_allclose((on - off) / 4, operator.A(x).flatten(), rtol=1e-5, atol=1e-6)


def test_a_pixel_is_a_square_of_mirrors():
    frames = mirror_frames(torch.tensor([[1.0, -1.0, -1.0, 1.0]]), mirrors=3)
    assert frames.shape == (1, 6, 6)
    assert frames[0, :3, :3].all() and not frames[0, :3, 3:].any() and frames[0, 3:, 3:].all()


@settings(deadline=None, max_examples=20)
@given(FRAMES)
def test_png_files_hold_one_bit_a_mirror(tmp_path_factory, frames):
    paths = save_frames(frames, tmp_path_factory.mktemp("frames"))
    assert [path.name for path in paths] == [f"pattern_{number:03}.png" for number in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        with Image.open(path) as image:
            assert image.mode == "1"
            np.testing.assert_array_equal(np.asarray(image), frame)
        header = path.read_bytes()[16:33]
        assert header[8:10] == b"\x01\x00"  # bit depth 1, grey


@settings(deadline=None)
@given(FRAMES)
def test_packed_bits_are_read_back(tmp_path_factory, frames):
    [path] = save_frames(frames, tmp_path_factory.mktemp("frames"), "bits")
    np.testing.assert_array_equal(read_packed_frames(path, *frames.shape[1:]), frames)


@settings(deadline=None)
@given(FRAMES)
def test_packed_bits_have_the_documented_order(tmp_path_factory, frames):
    [path] = save_frames(frames, tmp_path_factory.mktemp("frames"), "bits")
    data = path.read_bytes()
    count, height, width = frames.shape
    row_bytes = (width + 7) // 8
    assert len(data) == count * height * row_bytes
    for number, row, column in np.ndindex(count, height, width):
        byte = data[(number * height + row) * row_bytes + column // 8]
        assert bool(byte >> (7 - column % 8) & 1) == frames[number, row, column]


def test_files_are_replaced_on_demand_only(tmp_path):
    frames = np.ones((2, 2, 2), bool)
    save_frames(frames, tmp_path)
    with pytest.raises(FileExistsError, match=r"pattern_000\.png is there already"):
        save_frames(~frames, tmp_path)
    save_frames(~frames, tmp_path, overwrite=True)
    assert not np.asarray(Image.open(tmp_path / "pattern_001.png")).any()


@pytest.mark.parametrize(
    ("patterns", "mirrors", "words"),
    [
        (torch.tensor([[1.0, 0.0, -1.0, 1.0]]), 1, "magnitude 0 to 1: mirrors show one magnitude"),
        (torch.zeros(1, 4), 1, "magnitude 0 to 0"),
        (torch.tensor([[1.0, -1.0, float("nan"), 1.0]]), 1, "one magnitude"),
        (torch.ones(2, 6), 1, r"shape \(2, 6\)"),
        (torch.ones(4), 1, r"shape \(4,\)"),
        (torch.ones(2, 4), 0, "mirrors=0"),
    ],
)
def test_what_mirrors_cannot_show_is_refused(patterns, mirrors, words):
    with pytest.raises(pb.PIBiNNError, match=words):
        mirror_frames(patterns, mirrors)


@pytest.mark.parametrize(("content", "size"), [(b"", (2, 2)), (b"\0\0\0", (2, 2)), (b"\0\0", (0, 2))])
def test_a_file_of_other_frames_is_refused(tmp_path, content, size):
    path = tmp_path / "patterns.bin"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=f"{len(content)} bytes"):
        read_packed_frames(path, *size)


@pytest.fixture
def packed(tmp_path):
    """A packed camera of random signs, and its patterns."""
    network = SinglePixelCamera(SupportLISTA(MirrorPatterns(BlockPatterns(8, 5, seed=2)), stages=1, channels=0))
    pb.prepare(network, {"decoder.operator.weight": None})
    return pb.save(pb.convert(network), tmp_path / "camera.safetensors"), network.patterns.matrix()


def test_the_command_writes_the_frames_of_a_packed_camera(packed, tmp_path, capsys):
    path, patterns = packed
    main(["frames", str(path), "-o", str(tmp_path / "png")])
    main(["frames", str(path), "-o", str(tmp_path / "bits"), "--format", "bits", "--mirrors", "2"])
    printed = capsys.readouterr().out
    assert "5 frames of 8 × 8 mirrors" in printed and "5 frames of 16 × 16 mirrors" in printed
    expected = mirror_frames(patterns)
    shown = [np.asarray(Image.open(tmp_path / "png" / f"pattern_{number:03}.png")) for number in range(5)]
    np.testing.assert_array_equal(shown, expected)
    whole = read_packed_frames(tmp_path / "bits" / "patterns.bin", 16, 16)
    np.testing.assert_array_equal(whole[:, ::2, ::2], expected)


@pytest.mark.parametrize(
    ("network", "words"),
    [("absent", "absent"), ("no patterns", "holds a SupportLISTA with 0 sets of patterns"), ("twice", "already")],
)
def test_an_error_of_the_command_is_one_line(packed, tmp_path, capsys, network, words):
    path, folder = packed[0], tmp_path / "frames"
    if network == "absent":
        path = tmp_path / "absent.safetensors"
    elif network == "no patterns":
        solver = pb.prepare(SupportLISTA(stages=1, layers=1, channels=2), {"*.weight": None})
        path = pb.save(pb.convert(solver), tmp_path / "denoiser.safetensors")
    else:
        main(["frames", str(path), "-o", str(folder)])
    with pytest.raises(SystemExit) as exit:
        main(["frames", str(path), "-o", str(folder)])
    assert exit.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]
