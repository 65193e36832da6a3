"""Physics operators with ``A`` and ``A_adjoint``, as in deepinv: any such object is accepted in their place.

Batches are rows: ``A`` maps ``(..., unknowns)`` to ``(..., measurements)``, ``A_adjoint`` the other way. Operators that
are generated from a seed keep their entries out of checkpoints and packed files: the seed stands for them. Physics that
works on images, or knows no ``shape``, goes into `FlattenedPhysics`.
"""

from lightning_modules.operators.base import PhysicsOperator, operator_blocks, spectral_norm
from lightning_modules.operators.blocks import BlockOperator, DenseOperator, GaussianBlocks, SignBlocks
from lightning_modules.operators.convolution import CircularConvolution
from lightning_modules.operators.flattened_physics import FlattenedPhysics
from lightning_modules.operators.sparse_signs import SparseSigns
from lightning_modules.operators.subsampled import SubsampledDCT, SubsampledHadamard

__all__ = [
    "BlockOperator",
    "CircularConvolution",
    "DenseOperator",
    "FlattenedPhysics",
    "GaussianBlocks",
    "PhysicsOperator",
    "SignBlocks",
    "SparseSigns",
    "SubsampledDCT",
    "SubsampledHadamard",
    "operator_blocks",
    "spectral_norm",
]
