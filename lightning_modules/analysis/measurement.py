"""Errors of an unrolled iteration measured layer by layer, beside those that its certificate allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.analysis.convergence import Certificate
from lightning_modules.analysis.unrolled import Unrolled, multiply
from pibinn_plugin.tables import text_table

__all__ = ["Measurement", "measure", "measure_examples"]

_ROUNDING = 1e-12  # of y - A x for an exact y


@dataclass(frozen=True, eq=False)
class Measurement:
    """Errors measured on random instances that meet the assumptions of a certificate, beside what it certifies.

    Args:
        certificate: with the assumptions.
        errors: ‖e_k‖₁ of each instance, shape ``(layers + 1, instances, blocks)``.
        off_support: the largest |x_k| where x* has a zero, the same shape; 0 up to rounding where certified.
        source: what the instances are.
    """

    certificate: Certificate
    errors: Tensor
    off_support: Tensor
    source: str = "random instances"

    def __str__(self) -> str:
        rows, totals = [], self.errors.sum(-1)
        for k, total in enumerate(totals):
            contraction = f"{(total / totals[k - 1]).max():.4g}" if k else ""
            numbers = (total.mean(), total.max(), self.certificate.errors[k].sum())
            off = f"{self.off_support[k].max():.4g}"
            rows.append([str(k), *(f"{number:.4g}" for number in numbers), contraction, off])
        columns = ("layer", "mean ‖e‖₁", "largest ‖e‖₁", "certified ‖e‖₁", "largest contraction", "off support")
        legend = (
            f"Measured on {totals.shape[1]} {self.source} that meet the assumptions; sums over the blocks.\n"
            "contraction: of one layer, one instance. off support: largest entry where x* is zero."
        )
        return text_table(columns, rows) + f"{legend}\n{self.certificate.assumptions}"


def measure(
    unrolled: Unrolled, certificate: Certificate, instances: int = 1000, generator: torch.Generator | None = None
) -> Measurement:
    """Run the iteration on random x* and ε that meet the certificate's assumptions, extreme ones among them.

    Supports are uniform. The entries of x* are uniform in [-B, B], and ±B in every second instance; the noise is
    uniform in [-σ, σ], and ±σ in two of four.

    Args:
        unrolled: what the certificate is for; its thresholds are those of the certificate.
        certificate: of `certify`.
        instances: how many.
        generator: of the random numbers.

    Raises:
        ValueError: fewer than one instance.

    Example:
        >>> from lightning_modules.analysis.convergence import certify
        >>> unrolled = Unrolled(torch.eye(4)[None], torch.eye(4)[None], torch.full((3,), 0.5))
        >>> certificate = certify(unrolled, sparsity=2, amplitude=1.0)
        >>> bool((measure(unrolled, certificate).errors.amax(1) <= certificate.errors + 1e-12).all())
        True
    """
    if instances < 1:
        raise ValueError(f"instances={instances}: expected at least one")
    blocks, m, n = unrolled.operator.shape
    # The position of each entry in a random order of its block: the first s are the support.
    rank = torch.rand(instances, blocks, n, generator=generator).argsort(-1).argsort(-1)
    support = rank < torch.tensor(certificate.sparsity)[:, None]
    index = torch.arange(instances)[:, None, None]
    x = _uniform_or_extreme((instances, blocks, n), index % 2 == 0, generator) * certificate.amplitude * support
    noise = _uniform_or_extreme((instances, blocks, m), index % 4 < 2, generator) * certificate.noise
    y = multiply(unrolled.operator, x) + noise
    return _measure(unrolled, certificate, y, x, support, "random instances")


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
    return _measure(unrolled, certificate, y, x, x != 0, "examples")


def _measure(
    unrolled: Unrolled, certificate: Certificate, y: Tensor, x: Tensor, support: Tensor, source: str
) -> Measurement:
    run = Unrolled(unrolled.operator, unrolled.weights, unrolled.step_sizes, certificate.thresholds)
    iterates = run.run(y)
    return Measurement(certificate, (iterates - x).abs().sum(-1), (iterates * ~support).abs().amax(-1), source)


def _uniform_or_extreme(shape: tuple[int, ...], extreme: Tensor, generator: torch.Generator | None) -> Tensor:
    values = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return torch.where(extreme, torch.where(values < 0, -1.0, 1.0).double(), values)
