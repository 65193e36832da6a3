"""Errors of an unrolled iteration measured layer by layer, beside those that its certificate allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.analysis.convergence import Certificate
from lightning_modules.analysis.unrolled import Unrolled, multiply
from pibinn_plugin.tables import text_table

__all__ = ["Measurement", "measure_examples"]

_ROUNDING = 1e-12  # of y - A x for an exact y


@dataclass(frozen=True, eq=False)
class Measurement:
    """Errors measured on examples that meet the assumptions of a certificate, beside what it certifies.

    Args:
        certificate: with the assumptions.
        errors: ‖e_k‖₁ of each example, shape ``(layers + 1, examples, blocks)``.
        off_support: the largest |x_k| where x* has a zero, the same shape; 0 up to rounding where certified.
    """

    certificate: Certificate
    errors: Tensor
    off_support: Tensor

    @property
    def contraction(self) -> Tensor:
        """‖e_k‖₁ over ‖e_{k-1}‖₁, summed over the blocks, shape ``(layers, examples)``; 1 where both are zero."""
        totals = self.errors.sum(-1)
        return torch.where(totals[:-1] > 0, totals[1:] / totals[:-1], torch.where(totals[1:] > 0, torch.inf, 1.0))

    def __str__(self) -> str:
        rows, totals = [], self.errors.sum(-1)
        for k, total in enumerate(totals):
            contraction = f"{self.contraction[k - 1].max():.4g}" if k else ""
            numbers = (total.mean(), total.max(), self.certificate.errors[k].sum())
            off = f"{self.off_support[k].max():.4g}"
            rows.append([str(k), *(f"{number:.4g}" for number in numbers), contraction, off])
        columns = ("layer", "mean ‖e‖₁", "largest ‖e‖₁", "certified ‖e‖₁", "largest contraction", "off support")
        legend = (
            f"Measured on {totals.shape[1]:,} examples that meet the assumptions; sums over the blocks.\n"
            "contraction: of one layer, one example. off support: largest entry where x* is zero."
        )
        return text_table(columns, rows) + f"{legend}\n{self.certificate.assumptions}"


def measure_examples(unrolled: Unrolled, certificate: Certificate, y: Tensor, x: Tensor) -> Measurement:
    """Run the iteration on given examples that meet the certificate's assumptions, such as those of a test set.

    Args:
        unrolled: what the certificate is for; its thresholds are those of the certificate.
        certificate: of `certify`.
        y: measurements, shape ``(examples, blocks, m)``.
        x: unknowns x*, shape ``(examples, blocks, n)``.

    Raises:
        ValueError: shapes that do not fit, or an example that does not meet the assumptions.

    Example:
        >>> from lightning_modules.analysis.convergence import certify
        >>> unrolled = Unrolled(torch.eye(4)[None], torch.eye(4)[None], torch.full((3,), 0.5))
        >>> x = torch.eye(4)[:, None]
        >>> measure_examples(unrolled, certify(unrolled, sparsity=1, amplitude=1.0), x, x).errors[:, 0, 0].tolist()
        [1.0, 0.5, 0.25, 0.125]
    """
    y, x = (tensor.detach().to("cpu", torch.float64) for tensor in (y, x))
    blocks, m, n = unrolled.operator.shape
    if y.shape != (len(y), blocks, m) or x.shape != (len(y), blocks, n) or len(y) < 1:
        shapes = f"{tuple(y.shape)} and {tuple(x.shape)}"
        raise ValueError(f"y and x have the shapes {shapes}; expected (examples, {blocks}, {m}) and ({blocks}, {n})")
    noise = (y - multiply(unrolled.operator, x)).abs().max()
    counts = (x != 0).sum(-1).amax(0)
    sparse = (counts <= torch.tensor(certificate.sparsity)).all()
    if not (sparse and x.abs().max() <= certificate.amplitude and noise <= certificate.noise + _ROUNDING):
        raise ValueError(
            f"examples with up to {counts.tolist()} nonzeros in a block, |x*| up to {x.abs().max():g} and |noise| up "
            f"to {noise:g} do not meet the assumptions of the certificate: {certificate.assumptions}"
        )
    run = Unrolled(unrolled.operator, unrolled.weights, unrolled.step_sizes, certificate.thresholds)
    iterates = run.run(y)
    return Measurement(certificate, (iterates - x).abs().sum(-1), (iterates * (x == 0)).abs().amax(-1))
