"""The pictures that a test leaves behind, in a real Trainer, and what they show."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.image import imread
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.modules import SolverModule
from lightning_modules.pictures import ImagePictures, SignalPictures


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


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (lambda: ImagePictures(count=0), "count=0"),
        (lambda: SignalPictures(sampling_rate=0), "sampling_rate=0"),
    ],
)
def test_unfit_arguments_are_refused(callback, match):
    with pytest.raises(MisconfigurationException, match=match):
        callback()
