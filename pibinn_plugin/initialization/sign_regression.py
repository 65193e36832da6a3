"""Regression of outputs on inputs with one-bit weights: ``Y ≈ λ (S ⊙ M) X`` for signs S inside a structure M.

Three solutions of one least-squares problem: `ridge_weights` (float), `box_weights` (float, ``|V| ≤ λ``) and, from its
signs, `one_bit_start` (signs and λ). They see pairs through `PairStatistics` only: Gram matrices of the structural
nonzeros, whose memory is that of the blocks of a structure, not of rows × columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pibinn_plugin.errors import PIBiNNError, ScaleError
from pibinn_plugin.structure import Shape, Structure
from pibinn_plugin.structure.base import matrix_shape

BOX_STEPS, RELAXATION = 600, 1.6
SMALLEST_PENALTY = 1e-5  # of ADMM, in units of the largest eigenvalue
UNSEEN = 1e-12  # eigenvalues below, in units of the largest, are rounding
NOISE_RATIOS = torch.logspace(-12, 3, 61, dtype=torch.float64)  # σ² / λ², in units of the mean eigenvalue
FLIP_ROUNDS = 60
SMALLEST_LATENT = 0.2  # of λ: what the regression leaves near zero must still be able to change its sign in training


class OneBitStart(NamedTuple):
    """Where the training of a one-bit weight starts: its latents in compact form, and λ."""

    latent: Tensor
    scale: float

    @property
    def weight(self) -> Tensor:
        """``λ sign(V)``."""
        return torch.where(self.latent >= 0, self.scale, -self.scale).to(self.latent)


@dataclass
class RowGroups:
    """Rows with equally many structural nonzeros, grouped by where these are: dense blocks, batched.

    ``rows`` is (blocks, r), ``columns`` (blocks, c), ``compact`` (blocks, r, c) the index in the flat compact form,
    ``gram`` (blocks, c, c) is ``XᵀX`` and ``cross`` (blocks, r, c) is ``YᵀX``, for pairs as rows.
    """

    rows: Tensor
    columns: Tensor
    compact: Tensor
    gram: Tensor
    cross: Tensor


class PairStatistics:
    """What least squares needs of pairs (x, y) with ``y ≈ W x``: sums over pairs, added batch by batch.

    Every structure is taken apart into dense blocks: rows with the same columns. Memory is the sum over the blocks of
    columns² + rows · columns, which for a mask without equal rows is up to rows · columns². They are float64: the
    eigenvalues of XᵀX may span ten orders of magnitude, as those of blocks of natural images do.

    Args:
        structure: M.
        shape: of the dense weight; one of more than two dimensions is seen as its matrix.
        device: of the sums.

    Raises:
        StructureError: the structure does not fit the shape.

    Example:
        >>> from pibinn_plugin.structure import BlockDiagonal
        >>> statistics = PairStatistics(BlockDiagonal(2), (4, 6))
        >>> statistics.add(inputs=torch.randn(5, 6), outputs=torch.randn(5, 4))
        >>> statistics.pairs, statistics.groups[0].gram.shape
        (5, torch.Size([2, 3, 3]))
    """

    def __init__(self, structure: Structure, shape: Shape, device: torch.device | str | None = None) -> None:
        structure.check(shape)
        self.structure, self.shape, self.pairs = structure, tuple(shape), 0
        self.groups = list(_row_groups(structure, self.shape, device))

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add pairs: inputs (pairs, columns) and outputs (pairs, rows).

        Raises:
            PIBiNNError: other shapes, or a complex, NaN or infinite value.
        """
        rows, columns = matrix_shape(self.shape)
        if inputs.shape != (len(inputs), columns) or outputs.shape != (len(inputs), rows):
            raise PIBiNNError(
                f"a weight of shape {self.shape} maps inputs (pairs, {columns}) to outputs (pairs, {rows}); got inputs "
                f"{tuple(inputs.shape)} and outputs {tuple(outputs.shape)}"
            )
        for name, values in (("inputs", inputs), ("outputs", outputs)):
            if values.is_complex() or not values.isfinite().all():
                raise PIBiNNError(f"the {name} of {len(values)} pairs hold NaN or infinite values, or complex ones")
        self.pairs += len(inputs)
        for group in self.groups:
            x, y = (
                # The batch dimension is that of the blocks: (blocks, columns or rows, pairs).
                values.to(group.gram)[:, index].permute(1, 2, 0)
                for values, index in ((inputs, group.columns), (outputs, group.rows))
            )
            group.gram += x @ x.mT
            group.cross += y @ x.mT

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace every sum by that over the ranks of a distributed training."""
        self.pairs = int(sum_over_ranks(torch.tensor(self.pairs, device=self.groups[0].gram.device)))
        for group in self.groups:
            group.gram, group.cross = sum_over_ranks(group.gram), sum_over_ranks(group.cross)

    def compact(self, blocks: list[Tensor]) -> Tensor:
        """The compact form of a weight that is given group by group, each (blocks, r, c)."""
        flat = blocks[0].new_zeros(self.structure.nnz(self.shape))
        for group, block in zip(self.groups, blocks, strict=True):
            flat[group.compact] = block
        return flat.reshape(self.structure.compact_shape(self.shape))


def _row_groups(structure: Structure, shape: Shape, device: torch.device | str | None) -> Iterator[RowGroups]:
    rows, columns = matrix_shape(shape)
    positions, order = structure.positions(shape).sort()
    column_of, nonzeros = positions % columns, torch.bincount(positions // columns, minlength=rows)
    starts = nonzeros.cumsum(0) - nonzeros
    for c in nonzeros[nonzeros > 0].unique().tolist():
        alike = (nonzeros == c).nonzero().flatten()
        elements = starts[alike, None] + torch.arange(c, device=starts.device)
        patterns, pattern_of = column_of[elements].unique(dim=0, return_inverse=True)
        heights, by_pattern = torch.bincount(pattern_of), pattern_of.argsort(stable=True)
        firsts = heights.cumsum(0) - heights
        for r in heights.unique().tolist():
            chosen = (heights == r).nonzero().flatten()
            members = by_pattern[firsts[chosen, None] + torch.arange(r)]
            yield RowGroups(
                alike[members].to(device),
                patterns[chosen].to(device),
                order[elements[members]].to(device),
                torch.zeros(len(chosen), c, c, dtype=torch.float64, device=device),
                torch.zeros(len(chosen), r, c, dtype=torch.float64, device=device),
            )


@torch.no_grad()
def ridge_weights(statistics: PairStatistics) -> Tensor:
    """The float weight inside the structure that minimises ``‖Y - V X‖² + ρ ‖V‖²``, in compact form.

    ρ is the mean power of an input: it weighs as much as one more pair, whatever the units.

    Raises:
        PIBiNNError: no pairs, or inputs that are all zero.

    Example:
        >>> from pibinn_plugin.structure import Dense
        >>> statistics = PairStatistics(Dense(), (1, 2))
        >>> statistics.add(torch.eye(2).repeat(500, 1), torch.tensor([[3.0], [-1.0]]).repeat(500, 1))
        >>> ridge_weights(statistics).round(decimals=1)
        tensor([[ 3., -1.]], dtype=torch.float64)
    """
    penalty = _mean_power(statistics)
    weights = []
    for group in statistics.groups:
        identity = torch.eye(group.gram.shape[-1], dtype=group.gram.dtype, device=group.gram.device)
        weights.append(torch.linalg.solve(group.gram + penalty * identity, group.cross.mT).mT)
    return statistics.compact(weights)


@torch.no_grad()
def box_weights(statistics: PairStatistics, scale: float | None = None) -> OneBitStart:
    """The float weight that minimises ``‖Y - V X‖²`` over ``|V| ≤ λ``, by ADMM.

    A gradient method takes as many steps as the eigenvalues of XᵀX span; ADMM in their eigenvectors (Boyd et al.,
    Foundations and Trends in Machine Learning 3, 2011), over-relaxed, does not mind.

    Args:
        statistics: of the pairs.
        scale: λ, where it is known. Otherwise that of the largest likelihood (MacKay, "Bayesian Interpolation", Neural
            Computation 4, 1992) for signs that are independent of the inputs: ``Yᵀ X u / √μ ~ N(0, λ² μ + σ²)`` for
            every eigenvector u of XᵀX, of eigenvalue μ.

    Raises:
        PIBiNNError: no pairs, or inputs that are all zero.
        ScaleError: a scale that is not positive, or outputs that the inputs say nothing of, such as zeros.

    Example:
        >>> from pibinn_plugin.structure import Dense
        >>> statistics = PairStatistics(Dense(), (1, 2))
        >>> statistics.add(torch.eye(2).repeat(9, 1), torch.tensor([[3.0], [-1.0]]).repeat(9, 1))
        >>> box_weights(statistics, scale=2.0).latent
        tensor([[ 2., -1.]], dtype=torch.float64)
    """
    weights, scale = _box(statistics, scale)
    return OneBitStart(statistics.compact(weights), scale)


@torch.no_grad()
def one_bit_start(statistics: PairStatistics, scale: float | None = None) -> OneBitStart:
    """Signs S and λ that make ``‖Y - λ (S ⊙ M) X‖²`` small, as latents ``S · max(|V|, 0.2 λ)`` in compact form.

    S is the sign of the box solution V after up to 60 rounds of greedy descent, each of which flips in every row the
    one sign that lowers the error most; the exact problem is NP-hard.

    Args:
        statistics: of the pairs.
        scale: λ, where it is known. Otherwise that of `box_weights` finds the signs, and the λ that fits them best is
            returned.

    Raises:
        PIBiNNError: no pairs, or inputs that are all zero.
        ScaleError: a scale that is not positive, or outputs that the inputs say nothing of, such as zeros.

    Example:
        >>> from pibinn_plugin.structure import BlockDiagonal
        >>> operator = torch.where(torch.rand(2, 3, 4) < 0.5, -0.5, 0.5)
        >>> inputs = torch.randn(50, 8)
        >>> statistics = PairStatistics(BlockDiagonal(2), (6, 8))
        >>> statistics.add(inputs, BlockDiagonal(2).linear(inputs, operator, (6, 8)))
        >>> start = one_bit_start(statistics)
        >>> torch.equal(start.latent.sign(), operator.sign()), round(start.scale, 3)
        (True, 0.5)
    """
    weights, bound = _box(statistics, scale)
    signs = [torch.where(weight >= 0, 1.0, -1.0).to(weight) for weight in weights]
    for index, group in enumerate(statistics.groups):
        for _ in range(FLIP_ROUNDS):
            flipped = flip_one_sign_a_row(signs[index], group.gram, group.cross, bound)
            if torch.equal(flipped, signs[index]):
                break
            signs[index] = flipped
    scale = _fitting_scale(statistics, signs) if scale is None else scale
    latents = [one_bit_latent(sign, weight, scale) for sign, weight in zip(signs, weights, strict=True)]
    return OneBitStart(statistics.compact(latents), scale)


def one_bit_latent(signs: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Latents ``S · max(|V|, 0.2 λ)``: what is sure of its sign stays farther from zero.

    Example:
        >>> one_bit_latent(torch.tensor([1.0, -1.0]), torch.tensor([-0.01, -1.0]), 1.0)
        tensor([ 0.2000, -1.0000])
    """
    return signs * weight.abs().clamp_min(SMALLEST_LATENT * scale)


def flip_one_sign_a_row(signs: Tensor, gram: Tensor, cross: Tensor, scale: float) -> Tensor:
    """Flip in each row of the signs (..., r, c) the one that lowers ``‖Y - λ S X‖²`` most, where one does.

    Example:
        >>> flip_one_sign_a_row(torch.tensor([[1.0, 1.0]]), torch.eye(2), torch.tensor([[1.0, -1.0]]), 1.0)
        tensor([[ 1., -1.]])
    """
    energy = gram.diagonal(dim1=-2, dim2=-1)[..., None, :]
    # The change of the error by flipping s_j: 4 λ s_j (Y Xᵀ - λ S X Xᵀ)_j + 4 λ² (X Xᵀ)_jj, here over 4 λ.
    change = signs * (cross - scale * (signs @ gram)) + scale * energy
    least, where = change.min(dim=-1, keepdim=True)
    # Rounding must not flip a sign to and fro.
    lowers = least < -1e-6 * scale * energy.amax(dim=-1, keepdim=True)
    return signs.scatter(-1, where, torch.where(lowers, -1.0, 1.0).to(signs) * signs.gather(-1, where))


def _mean_power(statistics: PairStatistics) -> float:
    """Of an input."""
    if statistics.pairs == 0:
        raise PIBiNNError("no pairs: give at least one input with its output")
    energies = [group.gram.diagonal(dim1=-2, dim2=-1) for group in statistics.groups]
    energy = sum(float(energy.sum()) for energy in energies) / sum(energy.numel() for energy in energies)
    if energy == 0:
        raise PIBiNNError(f"the inputs of all {statistics.pairs} pairs are zero: no weight can be found from them")
    return energy / statistics.pairs


def _box(statistics: PairStatistics, scale: float | None) -> tuple[list[Tensor], float]:
    _mean_power(statistics)  # raises where there is nothing to solve
    spectra = [torch.linalg.eigh(group.gram) for group in statistics.groups]
    scale = _positive(_likely_scale(statistics.groups, spectra) if scale is None else scale)
    return [_admm(group, spectrum, scale) for group, spectrum in zip(statistics.groups, spectra, strict=True)], scale


def _admm(group: RowGroups, spectrum: tuple[Tensor, Tensor], bound: float) -> Tensor:
    eigenvalues, eigenvectors = spectrum
    largest = eigenvalues[:, -1:]
    median = torch.where(eigenvalues > UNSEEN * largest, eigenvalues, torch.nan).nanmedian(-1, keepdim=True).values
    # A block whose inputs are all zero has no eigenvalue, and any penalty will do.
    penalty = median.nan_to_num(1.0).maximum(SMALLEST_PENALTY * largest).unsqueeze(-1)
    inverse = eigenvectors / (eigenvalues.clamp_min(0).unsqueeze(-2) + penalty) @ eigenvectors.mT
    boxed, dual = torch.zeros_like(group.cross), torch.zeros_like(group.cross)
    for _ in range(BOX_STEPS):
        free = (group.cross + penalty * (boxed - dual)) @ inverse
        relaxed = RELAXATION * free + (1 - RELAXATION) * boxed
        boxed = (relaxed + dual).clamp(-bound, bound)
        dual = dual + relaxed - boxed
    return boxed


def _likely_scale(groups: list[RowGroups], spectra: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The λ of the largest likelihood of ``Yᵀ X u / √μ ~ N(0, λ² μ + σ²)``, see `box_weights`."""
    found = []
    for group, (eigenvalues, eigenvectors) in zip(groups, spectra, strict=True):
        seen = eigenvalues > UNSEEN * eigenvalues[:, -1:]
        energies = (group.cross @ eigenvectors).square().sum(-2)[seen] / eigenvalues[seen]
        found.append((eigenvalues[seen], energies, torch.full_like(energies, group.cross.shape[-2])))
    spectrum, energies, rows = (torch.cat(values) for values in zip(*found, strict=True))
    noises = (NOISE_RATIOS * float(spectrum.mean())).tolist()
    # For a given σ² / λ² the best λ² is a mean.
    squares = torch.stack([(energies / (spectrum + noise)).sum() / rows.sum() for noise in noises])
    losses = torch.stack([(rows * (spectrum + noise).log()).sum() for noise in noises]) + rows.sum() * squares.log()
    # Where eigenvalues are alike, any σ² explains the outputs as well: of those within a factor e² of the largest
    # likelihood, the smallest.
    return float(squares[losses <= losses.min() + 4][0].sqrt())


def _fitting_scale(statistics: PairStatistics, signs: list[Tensor]) -> float:
    """The λ that minimises ``‖Y - λ S X‖²``: ``⟨Y, S X⟩ / ‖S X‖²``."""
    agreement = energy = 0.0
    for group, sign in zip(statistics.groups, signs, strict=True):
        agreement += float((sign * group.cross).sum())
        energy += float((sign @ group.gram * sign).sum())
    return _positive(agreement / energy)


def _positive(scale: float) -> float:
    if not 0 < scale < float("inf"):
        raise ScaleError(
            f"the scale of the pairs is {scale:.3g}; expected a positive one: are inputs and outputs what the weight "
            f"maps from and to?"
        )
    return scale
