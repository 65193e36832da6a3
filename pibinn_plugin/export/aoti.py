"""A package compiled by AOTInductor. Run by ``torch._inductor.aoti_load_package(path)``, without this package."""

from __future__ import annotations

from pathlib import Path

import torch
import torch._inductor
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from pibinn_plugin.errors import ExportError
from pibinn_plugin.export.program import program_of
from pibinn_plugin.export.verify import Runner

DYNAMIC_BATCH = True


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Compile the network and write the package."""
    if path.suffix != ".pt2":
        raise ExportError(f"AOTInductor packages are named *.pt2; got {path.name!r}")
    try:
        # Signs are unpacked when the package is loaded; otherwise every product would unpack its own.
        options = {"aot_inductor.use_runtime_constant_folding": True}
        torch._inductor.aoti_compile_and_package(
            program_of(packed, args), package_path=str(path), inductor_configs=options
        )
    except InvalidCxxCompiler as error:
        raise ExportError(f"AOTInductor needs a C++ compiler (install g++ or set CXX): {error}") from error


def runner(path: Path) -> Runner:
    """Load the package; what comes back runs it."""
    model = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: pytree.tree_leaves(model(*inputs))
