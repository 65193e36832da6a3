"""The pictures that a test leaves behind, in a real Trainer, and what they show."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.modules import SolverModule
from lightning_modules.pictures import ImagePictures, PatternPictures, SignalPictures
from lightning_modules.solvers.single_pixel_camera import SinglePixelCamera
from lightning_modules.solvers.support_lista import SupportLISTA
from lightning_modules.walsh_patterns import WalshPatterns


class Half(torch.nn.Module):
    """An estimate that is easy to recognise: half the measurement."""

    def forward(self, y):
        return y / 2


def run_test(folder, callback, loader, operator=None, solver=None):
    """Test with the callback; returns the axes of the figure, of which the file is the picture."""
    figures = []
    original = callback.figure
    callback.figure = lambda examples: figures.append(original(examples)) or figures[-1]
    data = pl.LightningDataModule()
    data.test_dataloader, data.operator = lambda: loader, operator
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, callbacks=[callback], enable_progress_bar=False
    )
    trainer.test(SolverModule(solver or Half()), datamodule=data, verbose=False)
    assert [path.name for path in folder.iterdir()] == [callback.file_name]
    assert imread(folder / callback.file_name).std() > 0.01
    return figures[0].axes


def test_images_of_evenly_spaced_batches(tmp_path):
    x = torch.rand(6, 1, 12, 10)
    axes = run_test(tmp_path, ImagePictures(count=3), DataLoader(TensorDataset(x + 0.1, x), batch_size=1))
    assert len(axes) == 9
    for row, number in enumerate((0, 2, 4)):
        truth, measured, estimate = (np.asarray(axis.images[0].get_array()) for axis in axes[3 * row : 3 * row + 3])
        np.testing.assert_allclose(truth, x[number, 0])
        np.testing.assert_allclose(measured, x[number, 0] + 0.1)
        np.testing.assert_allclose(estimate, (x[number, 0] + 0.1) / 2)
        psnr = -10 * torch.log10(((x[number] + 0.1) / 2 - x[number]).square().mean())
        assert axes[3 * row + 2].get_title() == f"estimate, {psnr:.2f} dB"


def test_measurements_that_are_no_image_are_shown_by_the_adjoint(tmp_path):
    operator, x = BlockPatterns(block_size=4, measurements=4), torch.rand(2, 1, 8, 8)

    class Adjoint(torch.nn.Module):
        def forward(self, y):
            return operator.A_adjoint(y)

    loader = DataLoader(TensorDataset(operator.A(x), x), batch_size=2)
    axes = run_test(tmp_path, ImagePictures(count=1), loader, operator, Adjoint())
    np.testing.assert_allclose(axes[1].images[0].get_array(), operator.A_adjoint(operator.A(x))[0, 0])


def test_signals_show_traces_and_spectra(tmp_path):
    time = torch.arange(256) / 64
    x = torch.sin(2 * torch.pi * 10 * time).expand(3, 256)
    loader = DataLoader(TensorDataset(2 * x, x), batch_size=3)
    trace, spectrum = run_test(tmp_path, SignalPictures(count=1, sampling_rate=64.0), loader)
    lines = {line.get_label(): line for line in spectrum.lines}
    assert lines.keys() == {"noisy", "clean", "estimate"}
    for line in lines.values():
        assert line.get_xdata()[np.argmax(line.get_ydata())] == 10.0
    np.testing.assert_allclose(trace.lines[2].get_ydata(), x[0])
    assert trace.get_title() == "RRMSE 0.000" and trace.lines[0].get_xdata()[-1] == 255 / 64


class Camera(SinglePixelCamera):
    """A camera whose decoder is easy to recognise: the linear estimate, halved."""

    def forward(self, y):
        return self.patterns.linear_estimate(self.measure(y)) / 2


def test_patterns_and_what_they_recover(tmp_path):
    camera = Camera(SupportLISTA(WalshPatterns(block_size=4, measurements=3), channels=0))
    x = torch.rand(2, 1, 8, 12)
    scene = torch.cat([F.pixel_unshuffle(x, 4), 0.01 * torch.randn(2, 3, 2, 3)], dim=1)
    loader = DataLoader(TensorDataset(scene, x), batch_size=1)
    axes = run_test(tmp_path, PatternPictures(count=2), loader, solver=camera)
    drawn = [axis for axis in axes if axis.images]
    assert len(drawn) == 3 + 2 * 3
    for axis, pattern in zip(drawn, camera.patterns.matrix(), strict=False):
        np.testing.assert_array_equal(axis.images[0].get_array(), 4 * pattern.reshape(4, 4))
    for number in range(2):
        truth, linear, estimate = (np.asarray(axis.images[0].get_array()) for axis in drawn[3 + 3 * number :][:3])
        np.testing.assert_allclose(truth, x[number, 0])
        expected = camera.patterns.linear_estimate(camera.measure(scene[number : number + 1]))[0, 0]
        np.testing.assert_allclose(linear, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(estimate, expected / 2, rtol=1e-5, atol=1e-6)


def test_a_solver_without_patterns_has_no_picture_of_them(tmp_path):
    loader = DataLoader(TensorDataset(torch.rand(1, 4), torch.rand(1, 4)))
    with pytest.raises(MisconfigurationException, match="patterns of a SinglePixelCamera; the solver is a Half"):
        run_test(tmp_path, PatternPictures(), loader)


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (lambda: ImagePictures(count=0), "count=0"),
        (lambda: PatternPictures(count=0), "count=0"),
        (lambda: SignalPictures(sampling_rate=0), "sampling_rate=0"),
    ],
)
def test_unfit_arguments_are_refused(callback, match):
    with pytest.raises(MisconfigurationException, match=match):
        callback()
