"""Does a weight preserve the geometry of the physics operator? `compare_geometry` answers with a table.

W is set against the operator A of the same shape, measurements by unknowns: ``(blocks, rows, columns)`` and block by
block, or a matrix, which is one block. Weights shaped like Aᵀ, as a solver's are, are transposed by ``adjoint=True``.
`weight_variants` makes the one-bit, ternary and float twins of a latent, `network_geometry` takes a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_modules.analysis.network import network_scale, one_bit_weights
from lightning_modules.analysis.variants import weight_variants
from pibinn_plugin.errors import StructureError
from pibinn_plugin.structure import BlockDiagonal, Shape, Structure, matrix_shape
from pibinn_plugin.tables import text_table

__all__ = ["Geometry", "GeometryTable", "compare_geometry", "network_geometry"]

LARGEST_CHUNK = 1 << 22  # elements of the Gram matrices that are held at one time


@dataclass(frozen=True, eq=False)
class Geometry:
    """One weight W against A, block by block, in float64. What a block of zeros has not (a direction) is NaN.

    Args:
        alignment: ``⟨W, A⟩ / (‖W‖ ‖A‖)`` (Frobenius), shape ``(blocks,)``.
        overall_alignment: the same of all blocks together.
        singular_values: of W, descending, shape ``(blocks, min(rows, columns))``.
        principal_angles: between the row spaces of W and A, radians, ascending, ``min(rank W, rank A)`` for each block
            (Björck and Golub, 1973). All are 0 where the rows span the whole space.
        coherence: largest ``|⟨w_i, w_j⟩| / (‖w_i‖ ‖w_j‖)`` of two columns of a block (Donoho and Huo, 2001), shape
            ``(blocks,)``; columns of zeros are left out.
        distortion: ``(β - α) / (β + α)``, shape ``(blocks,)``, with α and β the least and the largest squared singular
            value of s sampled columns. No scale c gives c W a restricted-isometry constant δ_s (Candès and Tao, 2005)
            below it, and the least δ_s of all scales is this fraction over all sets of s columns.
    """

    alignment: Tensor
    overall_alignment: float
    singular_values: Tensor
    principal_angles: tuple[Tensor, ...]
    coherence: Tensor
    distortion: Tensor

    @property
    def spread(self) -> Tensor:
        """Standard deviation of the singular values over their mean, shape ``(blocks,)``."""
        return self.singular_values.std(-1, correction=0) / self.singular_values.mean(-1)


@dataclass(frozen=True, eq=False)
class GeometryTable:
    """The geometry of several weights by name, the operator's own first; ``print(table)`` shows each one's worst block.

    ``shape`` is the operator's ``(blocks, rows, columns)``; δ_s is of ``samples`` sets of ``sparsity`` columns.
    """

    rows: Mapping[str, Geometry]
    shape: tuple[int, int, int]
    sparsity: int
    samples: int
    seed: int
    title: str = "weight"

    def __str__(self) -> str:
        _, height, width = self.shape
        welch = math.sqrt((width - height) / (height * (width - 1))) if width > height else 0.0
        header = ("alignment", "overall", "σ min", "σ max", "σ spread", "angle mean", "angle max", "coherence", "δ_s ≥")
        rows = [[name, *_cells(row)] for name, row in self.rows.items()]
        return text_table([self.title, *header], rows, left_columns=1) + _LEGEND.format(**vars(self), welch=welch)


_LEGEND = """\
Worst block of {shape} (blocks, rows, columns); worst is the least alignment and σ min, the largest of the rest.
alignment: cosine of W and A; overall: of all blocks together. σ spread: standard deviation over mean of the singular
values. angles: between the row spaces, in degrees. coherence: of two columns; no block of this size has less than
{welch:.3f} (Welch bound). Only σ min and σ max see the scale of W. nan: a block of zeros.
δ_s: s = {sparsity}, {samples} sets of columns drawn uniformly (seed {seed}), W scaled as suits it best. Sampling gives
a LOWER BOUND of the restricted-isometry constant: it can refute the property and never certify it.
"""


def _cells(row: Geometry) -> list[str]:
    degrees, values = [torch.rad2deg(angles) for angles in row.principal_angles], row.singular_values
    mean, largest = (torch.stack([pick(angles) for angles in degrees]).max() for pick in (torch.mean, torch.max))
    overall = torch.tensor(row.overall_alignment)
    numbers = [row.alignment.min(), overall, values.min(), values.max(), row.spread.max()]
    cells = [f"{number:.3f}" for number in (*numbers, row.coherence.max(), row.distortion.max())]
    return [*cells[:5], f"{mean:.1f}", f"{largest:.1f}", *cells[5:]]


def compare_geometry(
    weights: Mapping[str, Tensor],
    operator: Tensor,
    adjoint: bool = False,
    sparsity: int | None = None,
    samples: int = 1000,
    seed: int = 0,
    title: str = "weight",
) -> GeometryTable:
    """The geometry of several weights against one operator, exact but for δ_s; all see the same sampled columns.

    Args:
        weights: name to W, each of the operator's shape, or with ``adjoint`` of that with rows and columns exchanged.
        operator: A, shape ``(blocks, rows, columns)`` or ``(rows, columns)``.
        adjoint: whether the weights are to be transposed.
        sparsity: s of the restricted-isometry distortion; by default a tenth of the columns.
        samples: sets of s columns to draw for it.
        seed: of the draw.
        title: heading of the first column.

    Raises:
        StructureError: a weight that does not fit, an entry that is not finite, an operator with a block of zeros.
        ValueError: a sparsity outside ``1 ... columns``, or no sample.

    Example:
        >>> operator = torch.randn(8, 32, 64)
        >>> rows = compare_geometry(weight_variants(operator), operator, samples=100).rows
        >>> f"{rows['float'].overall_alignment:.1f} {rows['one-bit global'].overall_alignment:.1f}"  # 1, sqrt(2/π)
        '1.0 0.8'
    """
    A = _blocks("the operator", operator)
    if (A == 0).all(-1).all(-1).any():
        raise StructureError(f"the operator of shape {tuple(operator.shape)} has a block of zeros; leave it out")
    blocks, measurements, columns = A.shape
    sparsity = max(1, columns // 10) if sparsity is None else sparsity
    supports, basis = _sampled_supports(columns, sparsity, samples, seed), _row_spaces(A)
    fitting = {name: _fitting_blocks(name, weight, A, adjoint) for name, weight in weights.items()}
    rows = {name: _geometry(W, A, basis, supports) for name, W in {"(operator)": A, **fitting}.items()}
    return GeometryTable(rows, (blocks, measurements, columns), sparsity, samples, seed, title)


def network_geometry(
    model: nn.Module,
    operators: Mapping[str, Tensor],
    adjoint: bool = False,
    twins: Mapping[str, nn.Module] | None = None,
    **options: int,
) -> dict[str, GeometryTable]:
    """`compare_geometry` by weight name: the variants of a prepared model's latents, a packed model's one-bit weights.

    Variants are made of the model's own latents without training; ``twins`` adds networks that were trained with other
    weights, each as a row of its own.

    Args:
        model: prepared or packed.
        operators: pattern of weight names to A. Blocks ``(blocks, rows, columns)`` ask for weights with as many equal
            diagonal blocks, in the weight's own order; with a matrix ``(rows, columns)``, any weight is one block.
        adjoint: whether the weights are shaped like Aᵀ.
        twins: name of a row to a network with weights of the same names and shapes.
        options: ``sparsity``, ``samples``, ``seed`` of `compare_geometry`.

    Raises:
        StructureError: a pattern that matches no one-bit weight, an operator that does not fit one, or a twin without
            such a weight.
        ScaleError: the model has no or several λ.

    Example:
        >>> from pibinn_plugin import BlockDiagonal, prepare
        >>> model = prepare(nn.Sequential(nn.Linear(64, 128)), {"0.weight": BlockDiagonal(2)})
        >>> list(network_geometry(model, {"*.weight": torch.randn(2, 32, 64)}, adjoint=True, samples=9))
        ['0.weight']
    """
    scale = network_scale(model)
    weights = {weight.name: weight for weight in one_bit_weights(model)}
    tables: dict[str, GeometryTable] = {}
    for pattern, operator in operators.items():
        names = [name for name in weights if fnmatchcase(name, pattern)]
        if not names:
            raise StructureError(f"{pattern!r} matches no one-bit weight of {', '.join(weights)}")
        for name in names:
            weight = weights[name]
            where = (weight.structure, weight.shape, operator.dim() == 3)
            known = weight.signs if weight.latent is None else weight.latent
            latent, mask = _arranged(name, known, *where)
            variants = weight_variants(latent, scale, mask)
            if weight.latent is None:  # a packed network has none
                variants = {"one-bit global": variants["one-bit global"]}
            for twin_name, twin in (twins or {}).items():
                compact = _weight_of_twin(twin_name, twin, name, weight.structure, weight.shape)
                variants[twin_name] = _arranged(name, compact, *where)[0]
            tables[name] = compare_geometry(variants, operator, adjoint, title=name, **options)
    return tables


def _weight_of_twin(twin_name: str, twin: nn.Module, name: str, structure: Structure, shape: Shape) -> Tensor:
    """The compact weight of that name, whatever the twin's scheme."""
    module_name, _, parameter = name.rpartition(".")
    try:
        weight = getattr(twin.get_submodule(module_name), parameter).detach()
    except AttributeError:
        raise StructureError(f"{twin_name!r} has no weight {name!r}") from None
    if weight.shape == tuple(structure.compact_shape(shape)):
        return weight
    if weight.shape != tuple(shape):
        raise StructureError(f"{name!r} of {twin_name!r} has shape {tuple(weight.shape)}; expected {tuple(shape)}")
    return structure.to_compact(weight)


def _arranged(
    name: str, compact: Tensor, structure: Structure, shape: Shape, in_blocks: bool
) -> tuple[Tensor, Tensor | None]:
    """The latents as blocks, or as a matrix with its mask."""
    if not in_blocks:
        matrix = matrix_shape(shape)
        return structure.to_dense(compact, shape).reshape(matrix), structure.mask(shape, compact.device).reshape(matrix)
    if isinstance(structure, BlockDiagonal) and structure.rows is None and len(shape) == 2:
        return compact.reshape(structure.compact_shape(shape)), None
    raise StructureError(
        f"{name!r} of shape {tuple(shape)} has {structure}; an operator of three dimensions asks for equal diagonal "
        f"blocks: give it as a matrix (rows, columns)"
    )


def _blocks(name: str, matrix: Tensor) -> Tensor:
    if matrix.dim() not in (2, 3) or matrix.numel() == 0 or not matrix.isfinite().all():
        raise StructureError(f"{name} has shape {tuple(matrix.shape)}; expected finite ([blocks,] rows, columns)")
    matrix = matrix.detach().to("cpu", torch.float64)
    return matrix if matrix.dim() == 3 else matrix[None]


def _fitting_blocks(name: str, weight: Tensor, A: Tensor, adjoint: bool) -> Tensor:
    W = _blocks(f"the weight {name!r}", weight)
    if (W := W.mT if adjoint else W).shape != A.shape:
        hint = f"; adjoint={not adjoint} would fit" if W.mT.shape == A.shape else ""
        expected = tuple((A.mT if adjoint else A).shape)
        raise StructureError(
            f"the weight {name!r} has shape {tuple(weight.shape)}; expected (blocks, rows, columns) = {expected} with "
            f"adjoint={adjoint}{hint}"
        )
    return W


def _sampled_supports(columns: int, sparsity: int, samples: int, seed: int) -> Tensor:
    """int64, shape ``(samples, sparsity)``: sets of columns, uniform."""
    if not 1 <= sparsity <= columns or samples < 1:
        raise ValueError(
            f"sparsity={sparsity}, samples={samples}: expected 1 to {columns} columns and a sample or more"
        )
    generator = torch.Generator().manual_seed(seed)
    # One at a time: for many columns, all at once would not fit.
    return torch.stack([torch.rand(columns, generator=generator).topk(sparsity).indices for _ in range(samples)])


def _geometry(W: Tensor, A: Tensor, operator_basis: list[Tensor], supports: Tensor) -> Geometry:
    alignment = (W * A).sum((-2, -1)) / (W.flatten(1).norm(dim=1) * A.flatten(1).norm(dim=1))
    overall = (W * A).sum() / (W.norm() * A.norm())
    angles = tuple(_principal_angles(*bases) for bases in zip(_row_spaces(W), operator_basis, strict=True))
    grams, values = W.mT @ W, torch.linalg.svdvals(W)
    chunks = supports.split(max(1, LARGEST_CHUNK // supports.shape[1] ** 2))
    distortion = [_distortion_of(gram[c[:, :, None], c[:, None, :]] for c in chunks) for gram in grams]
    return Geometry(alignment, overall.item(), values, angles, _coherence_of(grams), torch.stack(distortion))


def _row_spaces(W: Tensor) -> list[Tensor]:
    """Orthonormal rows that span those of each block, shape ``(rank, columns)``."""
    _, values, rows = torch.linalg.svd(W, full_matrices=False)
    # As torch.linalg.matrix_rank and numpy do it: what is below rounding is not part of the row space.
    ranks = (values > values[:, :1] * max(W.shape[1:]) * torch.finfo(W.dtype).eps).sum(-1)
    return [basis[:rank] for basis, rank in zip(rows, ranks.tolist(), strict=True)]


def _principal_angles(first: Tensor, second: Tensor) -> Tensor:
    if len(first) == 0:  # a block of zeros
        return first.new_full((1,), math.nan)
    return torch.linalg.svdvals(first @ second.mT).clamp(0, 1).acos()


def _coherence_of(grams: Tensor) -> Tensor:
    """The largest cosine of two columns, from Gram matrices ``(..., columns, columns)``: shape ``(...)``."""
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    cosines = grams.abs() * inverse[..., :, None] * inverse[..., None, :]
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    return cosines.amax((-2, -1)).clamp_max(1)


def _distortion_of(grams: Iterable[Tensor]) -> Tensor:
    """(β - α) / (β + α) over the extreme eigenvalues of all Gram matrices given, chunk by chunk."""
    # Eigenvalues: the worst of all vectors on the sampled columns, not of one drawn on them.
    values = [torch.linalg.eigvalsh(gram).clamp_min(0) for gram in grams]
    least, largest = (pick(torch.stack([pick(value) for value in values])) for pick in (torch.min, torch.max))
    return (largest - least) / (largest + least)
