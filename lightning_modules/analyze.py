"""The verb ``analyze``: the guarantees of `lightning_modules.analysis` for one trained solver, as tables and plots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.analysis.comparison import ConvergenceComparison, compare_convergence, plain_ista
from lightning_modules.analysis.contraction import one_bit_existence, spectral_contraction
from lightning_modules.analysis.generalization import Generalization, generalization_bounds
from lightning_modules.analysis.geometry import GeometryTable, network_geometry
from lightning_modules.analysis.plots import plot_bounds, plot_convergence, plot_sign_history, plot_spectra, save_figure
from lightning_modules.analysis.sign_history import SignHistory, read_sign_history
from lightning_modules.analysis.unrolled import Unrolled, read_solver
from lightning_modules.modules import SolverModule
from pibinn_plugin.errors import PIBiNNError

__all__ = ["Analysis", "analyze", "newest_sign_history"]


@dataclass(frozen=True)
class Analysis:
    """All results for one solver; ``print`` shows every table, `save_plots` draws them.

    Args:
        convergence: one-bit, float twin (where there is one) and plain ISTA.
        network: the one-bit iteration.
        geometry: by weight name.
        generalization: bounds and the measured gap.
        signs: the history of the signs; None where the run logged none.
    """

    convergence: ConvergenceComparison
    network: Unrolled
    geometry: dict[str, GeometryTable]
    generalization: Generalization
    signs: SignHistory | None

    def __str__(self) -> str:
        return "\n".join(f"== {title} ==\n{text}" for title, text in self._sections())

    def _sections(self) -> Iterator[tuple[str, str]]:
        yield "Convergence, side by side", str(self.convergence)
        for name, measured in self.convergence.measurements.items():
            yield f"Convergence certificate: {name}", f"{measured.certificate}\n\n{measured}\n"
        yield "Spectral contraction of the one-bit layers", f"{spectral_contraction(self.network)}\n"
        existence = one_bit_existence(self.network.operator[0])
        yield "Can one-bit weights contract for block 0 of the operator", f"{existence}\n"
        yield "Geometry of the weights against the operator, all layers", str(self._all_layers())
        yield "Generalization", str(self.generalization)
        none = "The run has no log with the flips of its signs.\n"
        yield "Signs during training", none if self.signs is None else str(self.signs)

    def _all_layers(self) -> GeometryTable:
        """One table, the operator's own row once."""
        first = next(iter(self.geometry.values()))
        rows = {"(operator)": first.rows["(operator)"]}
        for name, table in self.geometry.items():
            rows |= {f"{name}: {row}": found for row, found in table.rows.items() if row != "(operator)"}
        return replace(first, rows=rows, title="weight")

    def save_plots(self, folder: Path) -> list[Path]:
        """Draw everything into a folder; the spectra are those of the last layer."""
        figures = {
            "convergence": plot_convergence(self.convergence),
            "spectra": plot_spectra(list(self.geometry.values())[-1]),
            "bounds": plot_bounds(self.generalization),
        }
        if self.signs is not None:
            figures["signs"] = plot_sign_history(self.signs)
        return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


def analyze(
    module: SolverModule,
    untrained: nn.Module,
    float_twin: SolverModule | None,
    data: pl.LightningDataModule,
    signs: SignHistory | None = None,
    target_gap: float = 0.1,
) -> Analysis:
    """Analyze a prepared, trained solver on the data of its run.

    Convergence is certified for, and measured on, the test set. The gap is that between the examples of
    one epoch of training, each counted once, and the test set.

    Args:
        module: prepared, with a solver of the form that `read_solver` takes.
        untrained: the solver before training, for the thresholds of plain ISTA.
        float_twin: the same module, trained with float weights.
        data: with training and test batches (y, x).
        signs: the history of the signs.
        target_gap: the gap to tell the number of examples for.

    Raises:
        PIBiNNError: a solver of another form.
    """
    network, start = read_solver(module.solver), read_solver(untrained)
    assert start.thresholds is not None  # a solver has them
    networks = {"one-bit": network}
    if float_twin is not None:
        networks["float twin"] = read_solver(float_twin.solver)
    networks["plain ISTA"] = plain_ista(network.operator, start.thresholds)
    data.setup("fit")
    train = _distinct(*_examples(data.train_dataloader()))
    data.setup("test")
    test = _examples(data.test_dataloader())
    operator = network.operator if len(network.operator) > 1 else network.operator[0]
    twins = {} if float_twin is None else {"float, trained": float_twin}
    return Analysis(
        convergence=compare_convergence(networks, *test),
        network=network,
        geometry=network_geometry(module, {"solver.layers.*": operator}, adjoint=True, twins=twins),
        generalization=generalization_bounds(
            module.solver, train, test, {} if float_twin is None else {"float": float_twin.solver}, target_gap
        ),
        signs=signs,
    )


def newest_sign_history(root: Path) -> SignHistory | None:
    """The history in the newest log of a run that has one.

    Args:
        root: ``default_root_dir`` of the run.
    """
    logs = sorted(root.glob("lightning_logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    for log in reversed(logs):
        try:
            return read_sign_history(log)
        except PIBiNNError:  # a log of another verb, such as test
            continue
    return None


def _examples(loader: DataLoader[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    y, x = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return y, x


def _distinct(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each example once: an epoch may repeat a small training set, and the bounds count independent examples."""
    distinct = torch.cat([y, x], dim=-1).unique(dim=0)
    return distinct[:, : y.shape[-1]], distinct[:, y.shape[-1] :]
