"""Which packed layers multiply their bits as they are: the same values as by the weight, faster.

A packed module reads its weight (`unpack_signs`), which is all that it needs. `multiply_bits` is put on last, where a
layer is exactly a stock one: linear layers are here, convolutions in `packed_convolutions`. What is kept in memory for
inference is counted and switched off here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize
from typing_extensions import override

from pibinn_plugin.break_even import BreakEven, break_even
from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.functional import packed_linear, packed_linear_adjoint, packed_linear_int8
from pibinn_plugin.kernel import native
from pibinn_plugin.kernel.native import Layout
from pibinn_plugin.nn import CompactLinear, compact_linear
from pibinn_plugin.packed_convolutions import PackedConv1d, PackedConv2d
from pibinn_plugin.parametrized import set_class_before
from pibinn_plugin.structure import BlockDiagonal, Dense
from pibinn_plugin.structure.base import is_traced
from pibinn_plugin.unpack_signs import PackedLayer, UnpackSigns

# Bytes of bits below which products of floats take less time on a CUDA device, outside of graphs: not measured, but a
# call of Triton takes tens of microseconds, and cuBLAS as long for such a weight (benchmarks/results/cuda_products.md).
_SMALL_ON_CUDA = 2**23


class _MultipliesBits(PackedLayer):
    """A linear layer whose product is that of its packed bits; with anything attached to the weight, that of W."""

    int8_activations = False  # how the layer runs, not what it is: in no state dict or file
    _layout: Layout | None
    in_features: int
    out_features: int
    _break_even: BreakEven

    @override
    def forward(self, input: Tensor) -> Tensor:
        chain = self._plain_chain()
        if chain is None:
            return super().forward(input)
        own = self._parameters
        if not self._is_faster_on_bits(input, self.in_features) and not self.int8_activations and "bias" in own:
            weight, own_bias = chain._modules["0"].kept_weight(chain._buffers["original"]), own["bias"]
            is_float = own_bias is None or own_bias.dtype is torch.float32
            if is_float and weight is not None and weight.dtype is torch.float32:
                return self._multiply(input, weight, own_bias)
        if input.is_nested:  # which no product with λ takes
            return super().forward(input)
        bias: Any = self.bias
        if self.int8_activations:
            return self._product(packed_linear_int8, input, bias)
        if not torch.is_grad_enabled() and self._layout is not None and "bias" in self._parameters:
            output = self._fused(chain, input, self._layout, self._parameters["bias"], False)
            if output is not None:
                return output
        if self._reads_weight(input):
            return super().forward(input)
        return self._product(packed_linear, input, bias)

    def _multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of the float layer."""
        raise NotImplementedError

    def adjoint(self, input: Tensor) -> Tensor:
        """``λ (S ⊙ M)ᵀ y``: input ``(..., rows)``, output ``(..., columns)``."""
        chain = self._plain_chain()
        if chain is None:
            raise PIBiNNError("the weight of this layer is parametrized beyond its packed signs: multiply by weight.mT")
        if not torch.is_grad_enabled() and self._layout is not None:
            output = self._fused(chain, input, self._layout, None, True)
            if output is not None:
                return output
        rule = self._rule
        return packed_linear_adjoint(input, self.bits, rule.scale(), rule.structure, rule.shape)

    def stays_packed(self, input: Tensor) -> bool:
        """Whether products with this input multiply packed signs; elsewhere a weight that is read once takes less time.

        For what multiplies by one layer many times, as solvers do.
        """
        if is_dynamo_compiling() and not self._break_even.in_solvers:
            return False
        rule, bits = self._rule, self.bits
        if not self._is_faster_on_bits(input, self.out_features) and rule.kept_weight(bits) is not None:
            return False
        layout = native.layout_for(input, bits, rule.scale.value, None, rule.structure, rule.shape)
        return self._plain_chain() is not None and layout is not None and not _is_small_on_cuda(input, bits, rule)

    def _is_faster_on_bits(self, input: Tensor, features: int) -> bool:
        """Whether bits take less time for so many samples, in float32; graphs may take any number of them."""
        least, most, in_graphs, _ = self._break_even
        if is_dynamo_compiling() or type(count := input.numel()) is not int:
            return in_graphs or input.dtype is not torch.float32
        return least * features <= count <= most * features or input.dtype is not torch.float32

    def _reads_weight(self, input: Tensor) -> bool:
        """Whether a product on bits would unpack them or take longer, and a weight unpacked before is at hand."""
        rule, bits = self._rule, self.bits
        if input.dtype != rule.dtype:
            return False
        can_run = native.can_run(input, bits, rule.scale.value, None, self._layout)
        multiplies = can_run and not _is_small_on_cuda(input, bits, rule)
        return not multiplies and rule.kept_weight(bits) is not None

    def _product(self, product: Any, input: Tensor, bias: Tensor | None) -> Tensor:
        rule = self._rule
        return product(input, self.bits, rule.scale(), rule.structure, rule.shape, bias)

    def _fused(self, chain: Any, input: Tensor, layout: Layout, bias: Tensor | None, transposed: bool) -> Tensor | None:
        """One call of the kernel, λ's parameter and the bias with it; None where the kernel cannot run.

        More Python than this takes more time than a small product.
        """
        bits = chain._buffers["original"]
        rule = chain._modules["0"]
        scale = rule._scale[0]._parameters["value"]
        if torch._C._is_any_autocast_enabled() or not native.can_run(input, bits, scale, bias, layout):
            return None
        if input.is_cuda and not transposed and _is_small_on_cuda(input, bits, rule):
            return None
        rows, columns = layout
        kind = type(rows)
        if kind is Tensor:
            rows, columns = native.as_arguments(layout, input)
        elif not transposed:
            bits = rule.kept_words(bits, layout)
        return native.FUSED[kind](input, bits, scale, rows, columns, bias, transposed)


def _is_small_on_cuda(input: Tensor, bits: Tensor, rule: UnpackSigns) -> bool:
    """Whether an unpacked weight is kept and faster. A graph that is captured or compiled has calls at no such cost."""
    return (
        input.is_cuda
        and bits.numel() < _SMALL_ON_CUDA
        and rule.keeps_weight
        and not is_traced()
        and not torch.cuda.is_current_stream_capturing()
    )


class PackedLinear(_MultipliesBits, nn.Linear):
    """``nn.Linear`` on packed signs: ``y = λ (S ⊙ M) x + b``, input ``(..., columns)``, output ``(..., rows)``."""

    @override
    def _multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)


class PackedCompactLinear(_MultipliesBits, CompactLinear):
    """`CompactLinear` on packed signs."""

    @override
    def _multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return compact_linear(input, weight, self.structure, self.dense_shape, bias)


_PACKED_LAYERS: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    CompactLinear: PackedCompactLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
}


def multiply_bits(module: nn.Module) -> None:
    """Let a layer whose weight is packed multiply its bits directly, where it is exactly a stock layer.

    That is: of the very class, with nothing attached, and of convolutions those without a mask. Whatever else a module
    does, it goes on doing with the weight.
    """
    packed_layer = _PACKED_LAYERS.get(parametrize.type_before_parametrizations(module))
    if packed_layer is None or _has_attachments(module):
        return
    rule: UnpackSigns = module.parametrizations["weight"][0]  # type: ignore[index,assignment]
    structure = rule.structure
    if not issubclass(packed_layer, _MultipliesBits) and not isinstance(structure, Dense):
        return
    is_permuted = isinstance(structure, BlockDiagonal) and structure.row_order is not None
    module._layout = None if is_permuted else native.layout_of(structure, rule.shape)  # type: ignore[assignment]
    module._break_even = break_even(structure, rule.shape, rule.compact)  # type: ignore[assignment]
    set_class_before(module, packed_layer)


def stop_multiplying_bits(module: nn.Module) -> bool:
    """Undo `multiply_bits`: the layer has its stock class again. Returns whether it multiplied its bits."""
    packed_layer = parametrize.type_before_parametrizations(module)
    if not issubclass(packed_layer, PackedLayer):
        return False
    set_class_before(module, packed_layer.__bases__[1])
    for name in ("_layout", "_break_even", "int8_activations"):
        vars(module).pop(name, None)
    return True


def _has_attachments(module: Any) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    chains = getattr(module, "parametrizations", {})
    return any(hooks) or "forward" in vars(module) or list(chains) != ["weight"] or len(chains["weight"]) != 1


def use_int8_activations(model: nn.Module, enabled: bool = True) -> None:
    """Have every `PackedLinear` of a model round its input to int8, with a scale for each sample, or stop doing so.

    Inference alone, and less than exact: `functional.packed_linear_int8` has the formula and bounds of the error.
    Adjoints, convolutions and weights that are unpacked in front of their module stay exact. It is a choice of how a
    model runs: files, state dicts and what `export` writes know nothing of it.

    Args:
        model: what ``convert`` returned; changed in place.
        enabled: False brings the exact products back.

    Raises:
        PIBiNNError: the model has no layer that multiplies its bits.

    Example:
        >>> import pibinn_plugin as pb
        >>> model = pb.convert(pb.prepare(nn.Sequential(nn.Linear(16, 8)), {"0.weight": None}))
        >>> use_int8_activations(model)
        >>> with torch.no_grad():
        ...     model(torch.randn(3, 16)).shape
        torch.Size([3, 8])
    """
    layers = [module for module in model.modules() if isinstance(module, _MultipliesBits)]
    if not layers:
        raise PIBiNNError("the model has no PackedLinear, which alone has int8 activations; did you convert it?")
    for layer in layers:
        layer.int8_activations = enabled


def keep_unpacked(model: nn.Module, enabled: bool = True) -> None:
    """Have a packed model keep the weights that it unpacks, as it does unless told otherwise, or stop keeping them.

    For inference: a weight that is read as a tensor (a raw parameter, some convolutions, whatever multiplies by
    ``module.weight`` itself) is unpacked at its first use and kept until its bits or λ are written to, replaced or
    moved. It takes the memory of the float weight; `unpacked_bytes` counts it. Without, it is unpacked at each use.
    Linear layers do so where it takes less time (`break_even`) and where there is no kernel. Elsewhere they multiply
    their bits, and keep them a second time in the order in which products use them: as many bytes again, up to a
    quarter more where blocks are no multiples of 32, nothing where they are much smaller. State dicts, files, copies
    and exports hold bits only.

    A write that torch does not count, to ``bits.data`` or through numpy, is not seen: call this again after it, which
    drops what was kept.

    Args:
        model: what ``convert`` or ``load`` returned; changed in place.
        enabled: False drops what is kept and keeps no more.

    Example:
        >>> import pibinn_plugin as pb
        >>> model = pb.convert(pb.prepare(nn.Sequential(nn.Conv1d(2, 4, 3)), {"0.weight": None}))
        >>> with torch.no_grad():
        ...     output = model(torch.randn(1, 2, 16))
        >>> unpacked_bytes(model)
        96
        >>> keep_unpacked(model, False)
        >>> unpacked_bytes(model)
        0
    """
    for module in model.modules():
        if isinstance(module, UnpackSigns):
            module.keeps_weight = enabled
            module.drop_kept()


def unpacked_bytes(model: nn.Module) -> int:
    """The memory of the unpacked weights, their positions and the bits laid out that a packed model keeps; 0 at first.

    Beside it there are the bits, and a copy of them with which compiled code finds out whether they changed.
    `keep_unpacked` has an example.
    """
    return sum(module.kept_bytes for module in model.modules() if isinstance(module, UnpackSigns))
