"""A package compiled by AOTInductor. Run by ``torch._inductor.aoti_load_package(path)``, without this package."""

from __future__ import annotations

from pathlib import Path

import torch
import torch._inductor
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from pibinn_plugin.errors import ExportError
from pibinn_plugin.export.program import program_of, use_exportable_weights
from pibinn_plugin.export.unpack import UnpackForExport
from pibinn_plugin.export.verify import Runner
from pibinn_plugin.weights import packed_weights

DYNAMIC_BATCH = True


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Compile the network and write the package."""
    if path.suffix != ".pt2":
        raise ExportError(f"AOTInductor packages are named *.pt2; got {path.name!r}")
    if packed_weights(packed):  # else it is the float twin of a network
        use_exportable_weights(packed)
    # Weights are unpacked when the package is loaded, and not in every call, if they are made of tensors alone: not of
    # numbers, which the other pass makes of -λ and rules make masks of.
    options = {"aot_inductor.use_runtime_constant_folding": True, "joint_graph_constant_folding": False}
    for module in packed.modules():
        if isinstance(module, UnpackForExport):
            module.store_mask()
    try:
        torch._inductor.aoti_compile_and_package(
            program_of(packed, args), package_path=str(path), inductor_configs=options
        )
    except InvalidCxxCompiler as error:
        raise ExportError(f"AOTInductor needs a C++ compiler (install g++ or set CXX): {error}") from error


def runner(path: Path) -> Runner:
    """Load the package; what comes back runs it."""
    model = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: pytree.tree_leaves(model(*inputs))
