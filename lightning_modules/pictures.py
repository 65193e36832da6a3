"""Callbacks that save a picture of some test examples under the Trainer's ``default_root_dir``, after ``test``.

They need matplotlib: ``pip install pibinn-plugin[plot]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from typing_extensions import override

from lightning_modules.analysis.plots import save_figure
from lightning_modules.metrics import rrmse_temporal
from lightning_modules.solvers.single_pixel_camera import SinglePixelCamera

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

__all__ = ["ImagePictures", "PatternPictures", "SignalPictures"]


class Example(NamedTuple):
    """One test example: its measurements, the truth, and the estimate, without a batch dimension."""

    measured: Tensor
    truth: Tensor
    estimate: Tensor


class _TestPictures(Callback, ABC):
    """Keeps the first example of `count` test batches, evenly spaced, and saves one figure of them."""

    file_name: str

    def __init__(self, count: int = 3) -> None:
        if count < 1:
            raise MisconfigurationException(f"count={count}: a picture shows at least one example")
        self.count = count
        self._examples: list[Example] = []

    @abstractmethod
    def figure(self, examples: list[Example]) -> Figure:
        """Draw the examples."""

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._examples = []

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        batches = int(trainer.num_test_batches[dataloader_idx])
        if batch_idx not in {number * batches // self.count for number in range(self.count)}:
            return
        y, x = (values[:1] for values in batch)
        shown = (self.shown(trainer, y), x, pl_module(y))
        self._examples.append(Example(*(values[0].detach().float().cpu() for values in shown)))

    def shown(self, trainer: pl.Trainer, y: Tensor) -> Tensor:
        """What stands for the measurements in the picture."""
        return y

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or not self._examples:
            return
        if len(self._examples) < self.count:
            print(f"{self.file_name} shows {len(self._examples)} examples, not {self.count}: one of each test batch")
        save_figure(self.figure(self._examples), Path(trainer.default_root_dir) / self.file_name)


class ImagePictures(_TestPictures):
    """Saves ``images.png``: truth, measurement and estimate of some test images, with the PSNR of the latter two.

    Measurements that are not an image are shown as Aᵀ y, with the ``operator`` of the data module.

    Args:
        count: Number of images.

    Raises:
        MisconfigurationException: fewer than one.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ImagePictures(count=2)], logger=False, accelerator="cpu")
    """

    file_name = "images.png"

    @override
    def shown(self, trainer: pl.Trainer, y: Tensor) -> Tensor:
        operator = getattr(getattr(trainer, "datamodule", None), "operator", None)
        return y if operator is None else operator.A_adjoint(y)

    @override
    def figure(self, examples: list[Example]) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3 * len(examples)), layout="constrained")
        _draw_images(figure, examples, "measured")
        return figure


def _draw_images(figure: FigureBase, examples: list[Example], measured: str) -> None:
    """A row for each example: truth, what was measured (or made of it at once), and estimate, with their PSNR."""
    axes = figure.subplots(len(examples), 3, squeeze=False)
    for row, example in zip(axes, examples, strict=True):
        pictures = {"truth": example.truth, measured: example.measured, "estimate": example.estimate}
        for axis, (title, picture) in zip(row, pictures.items(), strict=True):
            if title != "truth":
                psnr = peak_signal_noise_ratio(picture, example.truth, data_range=(0.0, 1.0))
                title = f"{title}, {psnr:.2f} dB"
            axis.imshow(picture.squeeze().numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title)
            axis.set_axis_off()


class PatternPictures(_TestPictures):
    """Saves ``patterns.png``: the patterns of a `SinglePixelCamera`, and what it recovers of some test images.

    Between truth and estimate stands the linear estimate that the decoder starts from. Patterns are in the order of
    their exposure, row by row; white is +1, black -1.

    Args:
        count: Number of images.

    Raises:
        MisconfigurationException: fewer than one; by a test, a solver that is no `SinglePixelCamera`.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PatternPictures(count=2)], logger=False, accelerator="cpu")
    """

    file_name = "patterns.png"

    def __init__(self, count: int = 2) -> None:
        super().__init__(count)
        self._patterns = torch.empty(0)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        if not isinstance(pl_module.solver, SinglePixelCamera):
            raise MisconfigurationException(
                f"PatternPictures shows the patterns of a SinglePixelCamera; the solver is a "
                f"{type(pl_module.solver).__name__}"
            )
        operator = pl_module.solver.patterns
        size = operator.block_size
        self._patterns = size * operator.matrix().detach().float().cpu().unflatten(1, (size, size))

    @override
    def shown(self, trainer: pl.Trainer, y: Tensor) -> Tensor:
        camera = cast(SinglePixelCamera, trainer.lightning_module.solver)
        return camera.patterns.linear_estimate(camera.measure(y))

    @override
    def figure(self, examples: list[Example]) -> Figure:
        from matplotlib.figure import Figure

        columns = math.ceil(math.sqrt(2 * len(self._patterns)))
        rows = math.ceil(len(self._patterns) / columns)
        heights = (10 * rows / columns, 3 * len(examples))
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
        axes = above.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        for axis, pattern in zip(axes, self._patterns, strict=False):
            axis.imshow(pattern.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        _draw_images(below, examples, "linear estimate")
        return figure


class SignalPictures(_TestPictures):
    """Saves ``signals.png``: traces and power spectra of some test signals, measured, true and estimated.

    Args:
        count: Number of signals.
        sampling_rate: Samples a second.

    Raises:
        MisconfigurationException: fewer than one, or a rate that is not positive.

    Example:
        >>> trainer = pl.Trainer(callbacks=[SignalPictures()], logger=False, accelerator="cpu")
    """

    file_name = "signals.png"

    def __init__(self, count: int = 3, sampling_rate: float = 256.0) -> None:
        super().__init__(count)
        if not 0 < sampling_rate < float("inf"):
            raise MisconfigurationException(f"sampling_rate={sampling_rate}: it must be positive and finite")
        self.sampling_rate = sampling_rate

    @override
    def figure(self, examples: list[Example]) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3 * len(examples)), layout="constrained")
        axes = figure.subplots(len(examples), 2, squeeze=False, width_ratios=(2, 1))
        for (trace, spectrum), example in zip(axes, examples, strict=True):
            seconds = torch.arange(len(example.truth)).numpy() / self.sampling_rate
            hertz = torch.fft.rfftfreq(len(example.truth), 1 / self.sampling_rate).numpy()
            for name, signal in (("noisy", example.measured), ("clean", example.truth), ("estimate", example.estimate)):
                width = 0.6 if name == "noisy" else 1.2
                trace.plot(seconds, signal.numpy(), label=name, linewidth=width)
                spectrum.semilogy(hertz, torch.fft.rfft(signal).abs().square().numpy(), label=name, linewidth=width)
            trace.set_title(f"RRMSE {rrmse_temporal(example.estimate, example.truth):.3f}")
            trace.set_xlabel("s")
            spectrum.set_xlabel("Hz")
            spectrum.set_ylabel("power")
        axes[0, 0].legend(loc="upper right")
        return figure
