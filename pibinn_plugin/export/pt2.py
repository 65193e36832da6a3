"""A ``torch.export`` archive. Run by ``torch.export.load(path).module()``, without this package."""

from __future__ import annotations

import io
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
    # In memory first: torch ends the whole process where a disk is full.
    torch.export.save(program, archive := io.BytesIO())
    path.write_bytes(_with_compressed_texts(archive))


def runner(path: Path) -> Runner:
    """Load the archive; what comes back runs it."""
    module = torch.export.load(path).module()
    return lambda inputs: pytree.tree_leaves(module(*inputs))


def _with_compressed_texts(archive: io.BytesIO) -> bytes:
    """Compress the JSON of the archive: torch stores it as it is, and it takes more bytes than one-bit weights do."""
    compressed = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(compressed, "w") as target:
        for entry in source.infolist():
            method = zipfile.ZIP_DEFLATED if entry.filename.endswith(".json") else zipfile.ZIP_STORED
            target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry), method, compresslevel=9)
    return compressed.getvalue()
