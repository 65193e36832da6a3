"""A ``torch.export`` archive. Run by ``torch.export.load(path).module()``, without this package."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from pibinn_plugin.export.program import program_of
from pibinn_plugin.export.verify import Runner

DYNAMIC_BATCH = True


def write(packed: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """Write the archive."""
    program = program_of(packed, args)
    program._example_inputs = None  # else the batch becomes a part of the file
    torch.export.save(program, path)
    _compress_texts(path)


def runner(path: Path) -> Runner:
    """Load the archive; what comes back runs it."""
    module = torch.export.load(path).module()
    return lambda inputs: pytree.tree_leaves(module(*inputs))


def _compress_texts(path: Path) -> None:
    """Compress the JSON of the archive: torch stores it as it is, and it takes more bytes than one-bit weights do."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            method = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, method, compresslevel=9)
