"""A packed file at work: signals of any length, images, measurements; what does not fit is refused in one line."""

import importlib
import itertools
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import pibinn_plugin as pb
from lightning_modules.apply import apply, apply_file
from lightning_modules.apply.arrays import no_progress
from lightning_modules.apply.signals import apply_to_signals, windows_of
from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.cli import main
from lightning_modules.data.files import DataFileError
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA
from lightning_modules.solvers.hidden_lista import HiddenLISTA
from lightning_modules.solvers.support_lista import SupportLISTA

SIGNAL = {"kind": "signal", "sampling_rate": 256.0, "unit": "µV", "window": 512, "normalisation": "deviation"}
OPERATOR = SignBlocks(2, 8, 16)
SOLVERS = {
    "signal": (lambda: HiddenLISTA(channels=8, layers=2), SIGNAL),
    "image": (lambda: SupportLISTA(stages=1, layers=1, channels=4), {"kind": "image"}),
    "measurements": (lambda: CoupledISTA(OPERATOR, layers=2), SparseRecovery(OPERATOR).inputs),
    "blocks": (lambda: SupportLISTA(BlockPatterns(8, 16), stages=1, layers=1, channels=4),
               {"kind": "blocks", "size": 16, "deviation": 0.5}),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A packed file of each kind, and the network in it."""
    folder, made = tmp_path_factory.mktemp("packed"), {}
    for kind, (make, inputs) in SOLVERS.items():
        torch.manual_seed(0)
        packed = pb.convert(pb.prepare(make().eval(), {"*.weight": None}))
        made[kind] = pb.save(packed, folder / f"{kind}.safetensors", inputs), packed
    return made


def recording(*shape, dtype=np.float32):
    return (20 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def test_a_signal_of_one_window_is_answered_as_in_training(files):
    path, network = files["signal"]
    noisy = recording(512, dtype=np.float64)
    deviation = noisy.std()
    with torch.no_grad():
        expected = network(torch.from_numpy(noisy / deviation).float()[None])[0].numpy() * deviation
    cleaned = apply(path, noisy, sampling_rate=256)
    np.testing.assert_allclose(cleaned, expected, rtol=1e-6, atol=1e-6)
    assert cleaned.dtype == np.float64


@given(st.integers(2, 700), st.integers(1, 3), st.sampled_from([16, 33, 64]))
def test_a_network_that_does_nothing_gives_back_signals_of_any_length(length, channels, window):
    signals = recording(channels, length)
    cleaned = apply_to_signals(
        nn.Identity(), signals, SIGNAL | {"window": window}, 256.0, None, Path("x"), no_progress
    )  # fmt: skip
    np.testing.assert_allclose(cleaned, signals, rtol=1e-5, atol=1e-4)
    assert cleaned.shape == signals.shape and cleaned.dtype == np.float32


@given(st.integers(1, 5000), st.integers(2, 600))
def test_windows_cover_a_signal_and_overlap_by_half(length, window):
    length = max(length, window)
    starts = windows_of(length, window)
    assert starts[0] == 0 and starts[-1] == length - window
    assert all(0 <= later - start <= window // 2 for start, later in itertools.pairwise(starts))


def test_no_seam_is_left_where_windows_meet():
    """Windows that disagree are mixed: the step between two samples is a small part of their disagreement."""

    class Alternating(nn.Module):
        def forward(self, windows):
            return torch.where(torch.arange(len(windows))[:, None] % 2 == 0, 1.0, -1.0).expand_as(windows)

    signal = np.tile(np.array([20.0, -20.0]), 2000)
    mixed = apply_to_signals(Alternating(), signal, SIGNAL, 256.0, None, Path("x"), no_progress) / 20.0
    assert np.abs(mixed).max() <= 1 + 1e-9
    assert np.abs(np.diff(mixed)).max() < 2 * 0.02


def test_the_answer_is_in_the_unit_of_the_signal(files):
    path, _ = files["signal"]
    noisy = recording(2, 1500)
    cleaned = apply(path, noisy, sampling_rate=256)
    in_volts = apply(path, noisy * 1e-6, sampling_rate=256.0, unit="V")
    np.testing.assert_allclose(in_volts * 1e6, cleaned, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(apply(path, noisy[1], sampling_rate=256, unit="uV"), cleaned[1], rtol=1e-6)


@pytest.mark.parametrize("unit", ["V", "mV", "µV", None])
def test_a_network_without_normalisation_sees_its_own_unit(unit):
    class Clips(nn.Module):
        def forward(self, windows):
            return windows.clamp(-10, 10)

    volts = {"V": 1.0, "mV": 1e-3, "µV": 1e-6, None: 1e-6}[unit]
    microvolts = recording(700, dtype=np.float64)
    inputs = SIGNAL | {"normalisation": "none"}
    clipped = apply_to_signals(Clips(), microvolts * 1e-6 / volts, inputs, 256.0, unit, Path("x"), no_progress)
    np.testing.assert_allclose(clipped, microvolts.clip(-10, 10) * 1e-6 / volts, rtol=1e-5)


def test_a_signal_with_flat_parts_has_finite_answers(files):
    noisy = np.zeros(3000, np.float32)
    noisy[:100] = recording(100)
    assert np.isfinite(apply(files["signal"][0], noisy, sampling_rate=256)).all()


def test_vectors(files):
    path, network = files["measurements"]
    y, _ = SparseRecovery(OPERATOR).draw(700, 3)
    with torch.no_grad():
        expected = network(y)
    np.testing.assert_allclose(apply(path, y.numpy()), expected, rtol=1e-5, atol=1e-6)
    assert apply(path, y[3].numpy()).shape == (32,)


def test_measurements_of_blocks_become_an_image(files, tmp_path):
    path, network = files["blocks"]
    x = torch.rand(1, 1, 24, 32)
    y = BlockPatterns(8, 16).A(x)
    np.save(tmp_path / "y.npy", y[0].numpy())
    apply_file(path, tmp_path / "y.npy", tmp_path / "x.png")
    with torch.no_grad():
        expected = network(y).clamp(0, 1)[0, 0]
    image = np.array(Image.open(tmp_path / "x.png"))
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image / 255, expected, atol=0.51 / 255)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_goes_in_and_out(suffix, files, tmp_path):
    path, network = files["image"]
    levels = np.random.default_rng(0).integers(256, size=(20, 33, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "in.png")
    output = apply_file(path, tmp_path / "in.png", tmp_path / f"out.{suffix}")
    grey = np.array(Image.fromarray(levels).convert("L"), np.float32) / 255
    with torch.no_grad():
        expected = network(torch.from_numpy(grey)[None, None])[0, 0].clamp(0, 1).numpy()
    with Image.open(output) as image:
        assert image.format == {"png": "PNG", "jpg": "JPEG"}[suffix]
        assert np.abs(np.array(image) / 255 - expected).max() < (0.51 / 255 if suffix == "png" else 0.1)
    np.testing.assert_allclose(apply(path, tmp_path / "in.png"), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(path, grey), expected, rtol=1e-5, atol=1e-6)


def test_the_command(files, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "noisy.npy", recording(3, 1000))
    path, clean = files["signal"][0], tmp_path / "clean.npy"
    monkeypatch.setattr("sys.argv", ["pibinn", "apply", str(path), str(tmp_path / "noisy.npy"), "-o", str(clean)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "noisy.npy: found a signal of unknown sampling rate; expected 256 Hz" in capsys.readouterr().err
    assert not clean.exists()
    command = ["apply", str(path), str(tmp_path / "noisy.npy"), "-o", str(clean), "--sampling_rate", "256"]
    main(command)
    assert f"output: {clean}" in capsys.readouterr().out
    expected = apply(path, recording(3, 1000), sampling_rate=256)
    np.testing.assert_array_equal(np.load(clean), expected)
    clean.write_bytes(b"what was there before")
    with pytest.raises(SystemExit):
        main(command)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {clean}: found a file; expected none. Give --overwrite to replace it, or another name."]
    assert clean.read_bytes() == b"what was there before"
    main([*command, "--overwrite"])
    np.testing.assert_array_equal(np.load(clean), expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clean.npy", "noisy.npy"]


def test_the_console_script_is_the_command_line():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["pibinn"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


REFUSED = {
    "no rate": ("signal", recording(600), {}, "unknown sampling rate"),
    "another rate": ("signal", recording(600), {"sampling_rate": 500.0}, "a sampling rate of 500 Hz; expected 256 Hz"),
    "rate of nan": ("signal", recording(600), {"sampling_rate": float("nan")}, "expected 256 Hz"),
    "volts as microvolts": ("signal", recording(600) * 1e-6, {"sampling_rate": 256.0}, "Say which unit it is"),
    "unknown unit": ("signal", recording(600), {"sampling_rate": 256.0, "unit": "K"}, "the unit 'K'"),
    "nan": ("signal", np.r_[recording(600), np.float32("nan")], {"sampling_rate": 256.0}, r"the first at \(600,\)"),
    "three dimensions": ("signal", recording(2, 3, 600), {"sampling_rate": 256.0}, "or .channels, samples"),
    "integers": ("signal", np.arange(600), {"sampling_rate": 256.0}, "data type int64"),
    "nothing": ("signal", recording(0), {"sampling_rate": 256.0}, "no numbers"),
    "levels of 255": ("image", recording(20, 20) * 20, {}, "Divide them by their largest level"),
    "vectors of images": ("image", recording(400), {}, "expected .height, width."),
    "other vectors": ("measurements", recording(17), {}, r"expected \(16,\) or"),
    "other magnitude": ("measurements", recording(16) * 1e3, {}, "as in training"),
    "a rate of vectors": ("measurements", recording(16), {"sampling_rate": 1.0}, "Leave out rate and unit"),
    "other blocks": ("blocks", recording(15, 2, 2), {}, "rows, columns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_does_not_fit_is_refused_in_one_line(name, files):
    kind, data, arguments, words = REFUSED[name]
    with pytest.raises(DataFileError, match=words) as caught:
        apply(files[kind][0], data, **arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_do_not_fit_are_refused_before_anything_is_written(files, tmp_path):
    signal, image = files["signal"][0], files["image"][0]
    np.save(tmp_path / "in.npy", recording(600))
    Image.new("L", (20, 20)).save(tmp_path / "in.png")
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "archive.npz", a=np.ones(3))
    before = sorted(tmp_path.iterdir())
    for packed, data, output, words in (
        (signal, "in.png", "out.npy", "found an image"),
        (signal, "in.npy", "out.png", "the network gives none"),
        (signal, "in.npy", "out.txt", "the suffix '.txt'"),
        (signal, "in.npy", "no/out.npy", "no such folder"),
        (signal, "none.npy", "out.npy", "no such file"),
        (signal, "text.npy", "out.npy", "cannot be read"),
        (signal, "archive.npz", "out.npy", "an .npz archive"),
        (image, "in.npy", "out.npy", "expected .height, width."),
    ):
        with pytest.raises(DataFileError, match=words):
            apply_file(packed, tmp_path / data, tmp_path / output, sampling_rate=256.0 if packed == signal else None)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(pb.ArtifactError, match="does not take in data of shape"):
        apply(image, recording(4, 4) / 100)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "does not say what its network takes in"),
        ({"kind": "sound"}, "does not say what its network takes in"),
        (SIGNAL | {"window": 0}, "window=0"),
        (SIGNAL | {"window": 100}, "does not take in data of shape"),
        ({"kind": "signal"}, "sampling_rate=None"),
        (SIGNAL | {"normalisation": "largest"}, "the normalisation 'largest'"),
        (SIGNAL | {"unit": 3}, "unit=3"),
    ],
)
def test_a_file_that_does_not_say_what_it_takes_in_is_refused(inputs, words, files, tmp_path):
    path = pb.save(files["signal"][1], tmp_path / "net.safetensors", inputs)
    with pytest.raises(pb.ArtifactError, match=words):
        apply(path, recording(600), sampling_rate=256.0)
