"""An ExecuTorch program for its portable kernels. Run by ``executorch.runtime``, without this package."""

from __future__ import annotations

from pathlib import Path

from executorch.exir import to_edge
from executorch.runtime import Runtime
from torch import Tensor, nn

from pibinn_plugin.export.program import program_of
from pibinn_plugin.export.verify import Runner

DYNAMIC_BATCH = False  # its memory is planned when the file is written


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Write the program."""
    path.write_bytes(to_edge(program_of(packed, args, DYNAMIC_BATCH)).to_executorch().buffer)


def runner(path: Path) -> Runner:
    """Load the program; what comes back runs it."""
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda inputs: list(method.execute(inputs))
