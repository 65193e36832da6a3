"""`export_sizes`: the bytes of a network's files beside those of its float twin."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_model
from torch import Tensor, nn

from pibinn_plugin.errors import ExportError
from pibinn_plugin.export import checked_inputs, export, format_module, packed_copy
from pibinn_plugin.export.float_layers import with_float_weights
from pibinn_plugin.storage.packed_file import save


@dataclass(frozen=True)
class ExportSize:
    """The bytes of one file, and of the file of the same format that holds the float twin."""

    format: str
    bytes: int
    float_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes of the float twin for each byte of the network."""
        return self.float_bytes / self.bytes


def export_sizes(
    model: nn.Module, args: Sequence[Tensor], formats: Iterable[str] = ("onnx", "pt2")
) -> tuple[ExportSize, ...]:
    """Write a network to its packed file and to each format, its float twin likewise, and compare the bytes.

    The float twin is the same network with the same layers, and ``λ · S ⊙ M`` in them as float parameters.

    Args:
        model: a packed or prepared model.
        args: the inputs of the network, as for `export`.
        formats: as for `export`; all but ``"c"``, whose file is source code.

    Returns:
        One entry for the packed file, ``"packed"``, and one for each format.

    Raises:
        ExportError, PIBiNNError, ModuleNotFoundError: as `export`; or the format is ``"c"``.

    Example:
        >>> from pibinn_plugin import prepare
        >>> model = prepare(nn.Sequential(nn.Linear(64, 64)), {"0.weight": None})
        >>> [size.format for size in export_sizes(model, (torch.randn(4, 64),), formats=["pt2"])]
        ['packed', 'pt2']
    """
    formats = list(formats)
    if "c" in formats:
        raise ExportError("a C file is source code: what its object code takes, c_compiler.memory_sizes counts")
    packed, inputs = packed_copy(model), checked_inputs(args)
    twin = copy.deepcopy(packed)
    with_float_weights(twin)
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        network_path, twin_path = Path(folder) / "network.pt2", Path(folder) / "twin.pt2"
        save_model(twin, str(twin_path))
        sizes.append(ExportSize("packed", _size(save(packed, network_path)), _size(twin_path)))
        for format in formats:
            export(packed, network_path, inputs, format)
            format_module(format).write(copy.deepcopy(twin), inputs, twin_path)
            sizes.append(ExportSize(format, _size(network_path), _size(twin_path)))
    return tuple(sizes)


def _size(path: Path) -> int:
    return path.stat().st_size
