"""Convergence of several networks side by side: one-bit weights, their float twin, plain ISTA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.analysis.convergence import certify
from lightning_modules.analysis.measurement import Measurement, measure_examples
from lightning_modules.analysis.unrolled import Unrolled, multiply
from pibinn_plugin.tables import text_table

__all__ = ["ConvergenceComparison", "compare_convergence", "plain_ista"]


@dataclass(frozen=True)
class ConvergenceComparison:
    """Certificates and measured errors by name, all on the same examples; ``print`` shows them side by side."""

    measurements: Mapping[str, Measurement]

    def __str__(self) -> str:
        first = next(iter(self.measurements.values()))
        columns = [column for name in self.measurements for column in (f"{name}: rate", "certified", "mean")]
        layers = max(len(measured.errors) for measured in self.measurements.values())
        rows = [
            [str(layer), *(cell for measured in self.measurements.values() for cell in _layer_cells(measured, layer))]
            for layer in range(layers)
        ]
        summary = [[name, *_summary_cells(measured)] for name, measured in self.measurements.items()]
        header = ("network", "certified", "largest s", "largest rate", "mean ‖e‖₁ at the end", "part of the start")
        return (
            text_table(header, summary, left_columns=1)
            + text_table(["layer", *columns], rows)
            + f"{_LEGEND.format(instances=first.errors.shape[1])}{first.certificate.assumptions}\n"
        )


_LEGEND = """\
Each network has three columns, from its name on. rate: ρ(s) + s μ, worst block; below 1 the layer can contract.
certified: a bound of ‖e‖₁ for each example (inf: nothing is certified), with the thresholds that the network has,
summed over the blocks; mean: of ‖e‖₁, measured on {instances:,} examples. largest s: for which all layers can contract.
"""


def _summary_cells(measured: Measurement) -> list[str]:
    certificate, totals = measured.certificate, measured.errors.sum(-1).mean(1)
    numbers = (certificate.rates.max(), totals[-1], totals[-1] / totals[0])
    holds = "yes" if certificate.holds else "no"
    return [holds, str(certificate.largest_sparsity), *(f"{number:.4g}" for number in numbers)]


def _layer_cells(measured: Measurement, layer: int) -> list[str]:
    if layer >= len(measured.errors):
        return ["", "", ""]
    rate = f"{measured.certificate.rates[layer - 1].max():.4g}" if layer else ""
    certified = measured.certificate.errors[layer].sum()
    return [rate, f"{certified:.4g}", f"{measured.errors[layer].sum(-1).mean():.4g}"]


def compare_convergence(networks: Mapping[str, Unrolled], y: Tensor, x: Tensor) -> ConvergenceComparison:
    """Certify several networks for the same examples, and measure their errors on them.

    The assumptions of the certificates are the narrowest that all examples meet: in each block the largest number of
    nonzeros of an x, the largest entry of x, the largest entry of the noise y - A x.

    Args:
        networks: by name; all with one operator A.
        y: measurements, shape ``(examples, blocks * m)``.
        x: unknowns, shape ``(examples, blocks * n)``.

    Raises:
        ValueError: no network, networks of different operators, or examples that do not fit.

    Example:
        >>> network = Unrolled(torch.eye(4)[None], torch.eye(4)[None], torch.full((3,), 0.5), torch.zeros(3))
        >>> x = torch.eye(4)
        >>> comparison = compare_convergence({"a": network, "b": plain_ista(network.operator, torch.zeros(2))}, x, x)
        >>> [measured.errors[-1].max().item() for measured in comparison.measurements.values()]
        [0.125, 0.0]
    """
    operators = [network.operator for network in networks.values()]
    if not operators or not all(torch.equal(operator, operators[0]) for operator in operators):
        raise ValueError(f"expected networks of one operator; got {', '.join(networks) or 'none'}")
    blocks, m, n = operators[0].shape
    if y.shape != (len(y), blocks * m) or x.shape != (len(y), blocks * n) or len(y) < 1:
        shapes = f"{tuple(y.shape)} and {tuple(x.shape)}"
        raise ValueError(
            f"y and x have the shapes {shapes}; expected (examples, {blocks * m}), (examples, {blocks * n})"
        )
    y, x = (tensor.detach().to("cpu", torch.float64).unflatten(-1, (blocks, -1)) for tensor in (y, x))
    sparsity = (x != 0).sum(-1).amax(0).tolist()
    amplitude, noise = float(x.abs().max()), float((y - multiply(operators[0], x)).abs().max())
    return ConvergenceComparison(
        {
            name: measure_examples(network, certify(network, sparsity, amplitude, noise), y, x)
            for name, network in networks.items()
        }
    )


def plain_ista(operator: Tensor, thresholds: Tensor) -> Unrolled:
    """ISTA without training: W = Aᵀ, the step size 1 / ‖A‖₂² in all layers, these thresholds.

    Args:
        operator: A, shape ``(blocks, m, n)``.
        thresholds: θ_k, shape ``(layers,)``.

    Example:
        >>> plain_ista(2 * torch.eye(3)[None], torch.zeros(2)).step_sizes
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    step_size = 1 / torch.linalg.matrix_norm(operator.double(), 2).max().square()
    return Unrolled(operator, operator.mT, step_size.expand(len(thresholds)), thresholds)
