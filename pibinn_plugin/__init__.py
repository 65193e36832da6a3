"""PIBiNN: one-bit weights with one global scale and physics-fixed sparsity, for torchao, Brevitas and Lightning.

``W = λ · sign(V) ⊙ M``: a trained latent V, one positive λ for the whole network, and a structure M that the physics of
the inverse problem fixes (arXiv 2502.01908).
"""

import importlib
from typing import TYPE_CHECKING, Any

from pibinn_plugin.errors import ArtifactError, ExportError, PIBiNNError, ScaleError, StructureError, TargetError
from pibinn_plugin.export import export
from pibinn_plugin.structure import Banded, BlockDiagonal, Dense, Mask, Structure, structure_from_operator
from pibinn_plugin.workflow import convert, freeze_signs, global_scale, prepare

if TYPE_CHECKING:
    from pibinn_plugin.callback import TwoStageQAT
    from pibinn_plugin.initialization import SignsFromOperator, SignsFromPairs, start_float_weights
    from pibinn_plugin.storage.packed_file import load, save
    from pibinn_plugin.storage.recipe import records_arguments
    from pibinn_plugin.storage.summary import Summary, summary

# Imported when used: most bring safetensors or Lightning.
_LAZY = {
    "SignsFromOperator": "initialization",
    "SignsFromPairs": "initialization",
    "Summary": "storage.summary",
    "TwoStageQAT": "callback",
    "load": "storage.packed_file",
    "records_arguments": "storage.recipe",
    "save": "storage.packed_file",
    "start_float_weights": "initialization",
    "summary": "storage.summary",
}

__all__ = [
    "ArtifactError",
    "Banded",
    "BlockDiagonal",
    "Dense",
    "ExportError",
    "Mask",
    "PIBiNNError",
    "ScaleError",
    "SignsFromOperator",
    "SignsFromPairs",
    "Structure",
    "StructureError",
    "Summary",
    "TargetError",
    "TwoStageQAT",
    "convert",
    "export",
    "freeze_signs",
    "global_scale",
    "load",
    "prepare",
    "records_arguments",
    "save",
    "start_float_weights",
    "structure_from_operator",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pibinn_plugin' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"pibinn_plugin.{_LAZY[name]}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pibinn_plugin.{name} needs {error.name}: pip install pibinn-plugin[lightning]", name=error.name
        ) from error
    return getattr(module, name)
