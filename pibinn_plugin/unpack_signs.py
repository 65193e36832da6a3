"""The packed form of any module: bits in the place of a weight, unpacked when the weight is read.

The module stays the object that it was, with its class, attributes and hooks; ``module.weight`` is still W. That is all
a packed network needs; stock layers are made faster by `packed`. A weight that is read is kept unpacked for inference,
and bits that are multiplied are kept in the order of their use (`kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, compiler, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize
from typing_extensions import override

from pibinn_plugin.kept import KeptWeight, KeptWords, can_be_kept, can_be_laid_out
from pibinn_plugin.kernel import native
from pibinn_plugin.kernel.native import Blocks
from pibinn_plugin.kernel.operators import REFRESH, UNPACK_IN_GRAPH
from pibinn_plugin.packing import PackedSigns
from pibinn_plugin.parametrized import parametrize_by
from pibinn_plugin.quantizer import GlobalScale, OneBitRule, check_scale
from pibinn_plugin.structure import Dense

# Structural weights up to which a compiled graph unpacks them, at .1 to .2 ns each, in less time than it takes to call
# an operator which finds that they are still those that it unpacked before.
_SMALL_IN_GRAPHS = 2**16

_Method = TypeVar("_Method", bound=Callable[..., Any])


def asked_while_tracing(method: _Method) -> _Method:
    """A method that runs as it is while a graph is traced, with the tensors of that call; the graph holds its answer.

    As ``torch.compiler.assume_constant_result``, which would import the compiler.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


class UnpackSigns(OneBitRule):
    """A torch parametrization whose original is the packed signs and whose value is the weight ``λ · S ⊙ M``.

    Args:
        scale: the network's λ.
        packed: the weight.
        compact: True where the parameter is the compact form.
        dtype: of the weight; it follows the module to another one.

    Raises:
        ScaleError: λ is no positive finite number in this dtype.
    """

    def __init__(self, scale: GlobalScale, packed: PackedSigns, compact: bool, dtype: torch.dtype) -> None:
        super().__init__(scale, packed.structure, packed.shape, compact)
        if scale.value.device.type != "meta":
            check_scale(scale().item(), dtype)
        self.dtype = dtype
        self.keeps_weight = True
        self._count, self._compact_shape = packed.nnz, packed.structure.compact_shape(packed.shape)
        has_no_zeros = compact or isinstance(packed.structure, Dense)
        self._is_small = has_no_zeros and packed.nnz <= _SMALL_IN_GRAPHS
        self._kept: KeptWeight | None = None
        self._words: KeptWords | None = None
        self._positions: Tensor | None = None  # for compiled code, of the values in a weight with zeros elsewhere

    @override
    def forward(self, bits: Tensor) -> Tensor:
        weight = self.kept_weight(bits)
        return self._unpack(bits) if weight is None else weight

    def _weight_in_graph(self, bits: Tensor) -> Tensor | None:
        """In compiled code: a small weight is unpacked by the graph, a large one is kept and brought up to date."""
        # Not `torch.compiler`: that two files read one ``torch`` would be compared in Python at each call of the graph.
        if self._is_small and not compiler._is_exporting_flag:
            values = UNPACK_IN_GRAPH(bits, self._scale[0]._parameters["value"], self._count, self.dtype)
            return values.view(self._compact_shape)
        if not self.is_kept_for_graphs(bits):
            return None
        kept: Any = self._kept
        REFRESH(kept.weight, kept.seen, bits, self.scale.value, self._positions)
        return kept.weight

    @asked_while_tracing
    def is_kept_for_graphs(self, bits: Tensor) -> bool:
        """Whether a compiled graph may read the kept weight, which is unpacked now if need be."""
        if not self._can_unpack(bits, self.scale.value) or self.kept_weight(bits) is None:
            return False
        if self._positions is None and not self.compact and not isinstance(self.structure, Dense):
            with torch.inference_mode(False):
                self._positions = self.structure.positions(self.shape)
        return True

    def _can_unpack(self, bits: Tensor, scale: Tensor) -> bool:
        needs_gradient = torch.is_grad_enabled() and scale.requires_grad
        return not needs_gradient and self.dtype in native.DTYPES and native.can_run(scale, bits, scale, None)

    def kept_weight(self, bits: Tensor) -> Tensor | None:
        """The unpacked weight, where it is kept or can be from now on; None where each read unpacks."""
        if is_dynamo_compiling():  # what traces otherwise is noticed by the kept weight
            return self._weight_in_graph(bits)
        kept = self._kept  # once: another thread may drop it
        scale = self._scale[0]._parameters.get("value")
        if kept is not None and kept.is_of(bits, scale):
            return kept.weight
        kept = None
        if self.keeps_weight and scale is not None and can_be_kept(bits, scale):
            kept = KeptWeight(bits, scale, lambda: self._unpack(bits))
        self._kept = kept
        return None if kept is None else kept.weight

    def kept_words(self, bits: Tensor, blocks: Blocks) -> Tensor:
        """What a product with these blocks takes: the bits laid out for it where that is kept, or else as they are."""
        if is_dynamo_compiling():
            return bits
        kept = self._words  # once: another thread may drop it
        if kept is None or not kept.is_of(bits):
            kept = None
            if self.keeps_weight and can_be_laid_out(bits):
                count = self.structure.nnz(self.shape)
                kept = KeptWords(bits, lambda: native.prepare(bits, blocks, count))
            self._words = kept
        return bits if kept is None or kept.words is None else kept.words

    def _unpack(self, bits: Tensor) -> Tensor:
        scale = self.scale.value
        if self._can_unpack(bits, scale):
            packed = PackedSigns(bits, self.structure, self.shape)
            values = native.unpack(bits, scale, packed.nnz, self.dtype)
            values = values.view(self.structure.compact_shape(self.shape))
            return values if self.compact else self.structure.to_dense(values, self.shape)
        return PackedSigns(bits, self.structure, self.shape).weight(self.scale(), self.compact, self.dtype)

    @property
    def kept_bytes(self) -> int:
        """The memory of what is kept now: the unpacked weight, its positions, and the bits laid out for products."""
        kept, words = self._kept, self._words
        unpacked = 0 if kept is None else kept.weight.nbytes
        places = 0 if self._positions is None else self._positions.nbytes
        return unpacked + places + (0 if words is None or words.words is None else words.words.nbytes)

    def drop_kept(self) -> None:
        """Give that memory back."""
        self._kept = self._words = self._positions = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles unpack their weights and lay out their bits anew."""
        return {**vars(self), "_kept": None, "_words": None, "_positions": None}

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_kept()
        super()._load_from_state_dict(*args, **kwargs)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnpackSigns:
        self.drop_kept()
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.value.device)).dtype
        return self


def read_from_bits(module: nn.Module, name: str, unpack: UnpackSigns, bits: Tensor) -> None:
    """Let ``module.<name>`` be read from packed bits, in place; what it was before is dropped.

    Where the parameter is parametrized already, its later parametrizations stay on top.
    """
    native.warn_without_kernel()
    if parametrize.is_parametrized(module, name):
        # Not remove_parametrizations: it edits the class, which a deepcopy shares with the model it was copied from.
        chain: Any = module.parametrizations[name]  # type: ignore[index]
        del chain.original
        chain.register_buffer("original", bits)
        chain[0] = unpack
        unpack.is_attached = True
    else:
        delattr(module, name)
        module.register_buffer(name, bits)
        # unsafe: bytes go in and floating-point weights come out.
        parametrize_by(module, name, unpack, unsafe=True)


def packed_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor, UnpackSigns]]:
    """Name, bits and rule of each parameter of a module that is read from packed bits."""
    for name, chain in getattr(module, "parametrizations", {}).items():
        if isinstance(unpack := chain[0], UnpackSigns):
            yield name, chain.original, unpack


class PackedLayer(nn.Module):
    """A layer whose weight is read from packed bits and from nothing else, unless something is attached to it later."""

    @property
    def packed_signs(self) -> PackedSigns:
        """The packed weight."""
        rule = self._rule
        return PackedSigns(self.bits, rule.structure, rule.shape)

    @property
    def bits(self) -> Tensor:
        """The packed signs, uint8 of shape ``(bytes,)``."""
        return self.parametrizations.weight.original  # type: ignore[union-attr,return-value]

    @property
    def _rule(self) -> UnpackSigns:
        return self.parametrizations.weight[0]  # type: ignore[union-attr,index,return-value]

    def _plain_chain(self) -> Any:
        """The parametrization of the weight, where it is its packed signs and nothing else."""
        # Dictionaries, not attributes: nn.Module looks those up in Python, longer than a small product takes.
        parametrizations = self._modules.get("parametrizations")
        if parametrizations is None:
            return None
        chain = parametrizations._modules.get("weight")
        return chain if chain is not None and len(chain._modules) == 1 else None
