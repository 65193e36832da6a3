"""Where the bytes are: one table of a prepared or packed network, counted from what is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.storage.inventory import float_tensors, stored_scale
from pibinn_plugin.storage.stored_structures import StoredStructures
from pibinn_plugin.structure import Structure
from pibinn_plugin.tables import text_table
from pibinn_plugin.weights import OneBitWeight, one_bit_weights, scale_values


@dataclass(frozen=True)
class LayerSummary:
    """One line of the table: a one-bit weight with the float tensors of its module, or a module without one."""

    name: str
    shape: tuple[int, ...] = ()
    structure: Structure | None = None
    nnz: int = 0
    structure_bytes: int = 0  # 0 where an earlier weight has the same structure: it is stored once
    float_bytes: int = 0

    @property
    def dense_links(self) -> int:
        """The number of elements of the dense weight."""
        return math.prod(self.shape) if self.structure is not None else 0

    @property
    def payload_bytes(self) -> int:
        """The packed signs: one bit for each structural nonzero, in whole bytes."""
        return -(-self.nnz // 8)


@dataclass(frozen=True)
class Summary:
    """Where the bytes of a network are. ``print(summary)`` shows one table; the sums are those of the packed file."""

    layers: tuple[LayerSummary, ...]
    scale_bytes: int  # of λ, once; of all where layers that were packed apart have several

    @property
    def nnz(self) -> int:
        """Structural nonzeros of all one-bit weights."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def dense_links(self) -> int:
        """Elements of the same weights if they were dense."""
        return sum(layer.dense_links for layer in self.layers)

    @property
    def payload_bytes(self) -> int:
        """Packed signs of all weights."""
        return sum(layer.payload_bytes for layer in self.layers)

    @property
    def structure_bytes(self) -> int:
        """Descriptions of the distinct structures."""
        return sum(layer.structure_bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Every parameter and buffer that is not a one-bit weight."""
        return sum(layer.float_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Payload, structure, λ and float parameters: the packed file without its header."""
        return self.payload_bytes + self.structure_bytes + self.scale_bytes + self.float_bytes

    @property
    def float_twin_bytes(self) -> int:
        """The same network in fp32 with dense weights."""
        return 4 * self.dense_links + self.float_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (signs, structure, λ) for each structural weight."""
        return 8 * (self.payload_bytes + self.structure_bytes + self.scale_bytes) / self.nnz

    @property
    def bits_per_link(self) -> float:
        """The same bits for each element of the dense weights."""
        return 8 * (self.payload_bytes + self.structure_bytes + self.scale_bytes) / self.dense_links

    @property
    def ratio(self) -> float:
        """Bytes of the fp32 dense twin for each byte stored."""
        return self.float_twin_bytes / self.total_bytes

    def __str__(self) -> str:
        counts = (
            self.nnz,
            self.payload_bytes,
            self.structure_bytes,
            self.scale_bytes,
            self.float_bytes,
            self.total_bytes,
        )
        ratios = (f"{self.bits_per_weight:.3f}", f"{self.bits_per_link:.3f}", f"{self.ratio:.1f}")
        total = ["total", "", "", *(f"{count:,}" for count in counts), *ratios]
        return text_table(_COLUMNS, [*map(_layer_cells, self.layers), total], left_columns=3) + _LEGEND


_COLUMNS = (
    *("layer", "shape", "structure"),
    *("nnz", "signs", "structure", "λ", "float", "total", "bit/weight", "bit/link", "fp32/this"),
)
_LEGEND = (
    "signs, structure, λ, float, total: bytes as stored. bit/weight, bit/link: stored bits for each structural\n"
    "weight, and for each element of the dense weights. fp32/this: bytes of the same layers in fp32, dense, over total."
    "\nA structure that several weights have is stored once, and counted in the first of them."
)


def _layer_cells(layer: LayerSummary) -> list[str]:
    total = layer.payload_bytes + layer.structure_bytes + layer.float_bytes
    if layer.structure is None:
        return [layer.name, "", "", "", "", "", "", f"{layer.float_bytes:,}", f"{total:,}", "", "", "1.0"]
    weight_bits = 8 * (layer.payload_bytes + layer.structure_bytes)
    return [
        layer.name,
        "x".join(map(str, layer.shape)),
        layer.structure.kind,
        *(f"{number:,}" for number in (layer.nnz, layer.payload_bytes, layer.structure_bytes)),
        "",
        *(f"{number:,}" for number in (layer.float_bytes, total)),
        f"{weight_bits / layer.nnz:.3f}",
        f"{weight_bits / layer.dense_links:.3f}",
        f"{(4 * layer.dense_links + layer.float_bytes) / total:.1f}",
    ]


def summary(model: nn.Module) -> Summary:
    """Count the bytes of a prepared model (as it will be packed) or of a packed one (as it is).

    Raises:
        PIBiNNError: the model has no one-bit weight.

    Example:
        >>> from pibinn_plugin import BlockDiagonal, prepare
        >>> report = summary(prepare(nn.Linear(64, 64), {"weight": BlockDiagonal(8)}))
        >>> report.payload_bytes, report.structure_bytes, report.scale_bytes, report.float_bytes
        (64, 6, 4, 256)
    """
    weights = one_bit_weights(model)
    if not weights:
        raise PIBiNNError("the model has no one-bit weight; prepare it first")
    float_bytes: dict[str, int] = {}
    for each in float_tensors(model):
        module_name = each.keys[0].rpartition(".")[0]
        size = each.tensor.numel() * each.tensor.element_size()
        float_bytes[module_name] = float_bytes.get(module_name, 0) + size
    stored = StoredStructures.of(weight.structure for weight in weights)
    lengths = dict(enumerate(stored.lengths))
    layers = []
    for weight, number in zip(weights, stored.numbers, strict=True):
        in_structure, own_float_bytes = lengths.pop(number, 0), float_bytes.pop(weight.name.rpartition(".")[0], 0)
        nnz = weight.structure.nnz(weight.shape)
        layers.append(LayerSummary(weight.name, weight.shape, weight.structure, nnz, in_structure, own_float_bytes))
    layers += [LayerSummary(name or "(root)", float_bytes=count) for name, count in float_bytes.items()]
    return Summary(tuple(layers), sum(stored_scale(value).nbytes for value in _scales(weights)))


def _scales(weights: list[OneBitWeight]) -> list[float]:
    on_meta = any(weight.tensor.device.type == "meta" for weight in weights)
    return [1.0] if on_meta else scale_values(weights)
