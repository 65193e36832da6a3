"""Handlers with which Brevitas' own exporters write one-bit weights; `register` adds them to its exporters.

Brevitas matches a handler by the exact type of a weight's proxy. Its stock handlers quantize the latent V by rounding
V / λ, which is 0 wherever ``|V| < λ / 2``: a file without an error and without the network.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.export.inference.handler import InferenceHandler
from brevitas.export.inference.manager import InferenceManager
from brevitas.export.onnx.qonnx.function import BrevitasBinaryQuantOp, BrevitasQuantOp
from brevitas.export.onnx.qonnx.handler import BrevitasWeightQuantProxyHandler
from brevitas.export.onnx.qonnx.manager import QONNXManager
from brevitas.export.onnx.standard.qcdq.handler import StdQCDQCastONNXWeightQuantProxyHandler
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager
from brevitas.export.torch.qcdq.handler import TorchQCDQCastWeightQuantProxyHandler
from brevitas.export.torch.qcdq.manager import TorchQCDQManager
from torch import Tensor
from typing_extensions import override


class QONNXHandler(BrevitasWeightQuantProxyHandler):
    """``BipolarQuant(V, λ)``; ``Quant(W, λ)`` of two bits, which has a zero, where the weight has structural zeros."""

    handled_layer: type

    @override
    def prepare_for_export(self, module: Any) -> None:
        super().prepare_for_export(module)
        if module.is_quant_enabled:
            self.masked = None
            self.quant_op = BrevitasBinaryQuantOp
            if module.tensor_quant.sign_quantizer.mask is not None:
                # Not V, which Quant would round: W is on its grid.
                self.masked = module.tracked_module_list[0].quant_weight().value.detach()
                self.quant_op = BrevitasQuantOp

    @override
    def symbolic_execution(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().symbolic_execution(x if self.masked is None else self.masked)


class _IntegerWeight:
    """Gives ``sign(V) ⊙ M`` as int8 where Brevitas would quantize the latent, or look it up by its address."""

    handled_layer: type
    symbolic_kwargs: dict[str, Any] | None

    def validate(self, module: Any) -> None:
        """Nothing to refuse: one bit and two are integers of eight all the same."""

    def prepare_for_export(self, module: Any) -> None:
        super().prepare_for_export(module)  # type: ignore[misc]
        if self.symbolic_kwargs is not None:
            quantized = module.tracked_module_list[0].quant_weight()
            self.integers = (quantized.value / quantized.scale).round().to(torch.int8).detach()
            self.symbolic_kwargs["clip_symbolic_kwargs"] = None  # they are in range, also where one bit has no 0

    def quantize_from_floating_point(self, x: Tensor) -> Tensor:
        return self.integers

    def quantize_from_integer(self, x: Tensor) -> Tensor:
        return self.integers


class QCDQHandler(_IntegerWeight, StdQCDQCastONNXWeightQuantProxyHandler):
    """``DequantizeLinear`` of an int8 initializer."""


class TorchQCDQHandler(_IntegerWeight, TorchQCDQCastWeightQuantProxyHandler):
    """The same in torch."""


class QuantInferenceHandler(InferenceHandler):
    """``quant_inference_mode``: the weight, from its latent at each call."""

    handled_layer: type

    @override
    def prepare_for_export(self, module: Any) -> None:
        self._tensor_quant = (module.tensor_quant,)  # in a tuple: it is the proxy's child, not the handler's

    @override
    def quantize(self, x: Tensor) -> Any:
        raise NotImplementedError  # weights are quantized already

    @override
    def dequantize(self, x: Tensor) -> Any:
        raise NotImplementedError

    @override
    def forward(self, x: Tensor, unused_other: Tensor | None = None) -> Any:
        _, *others = self._tensor_quant[0](x)
        return self._tensor_quant[0].sign_quantizer(x), *others  # x is the latent: in export mode a handler quantizes


_HANDLERS: tuple[tuple[Any, type], ...] = (
    (QONNXManager, QONNXHandler),
    (StdQCDQONNXManager, QCDQHandler),
    (TorchQCDQManager, TorchQCDQHandler),
    (InferenceManager, QuantInferenceHandler),
)


def register(proxy_class: type) -> None:
    """Let Brevitas' exporters write the weights of proxies of this class; they are told once."""
    for manager, handler in _HANDLERS:
        handler.handled_layer = proxy_class  # type: ignore[attr-defined]
        if handler not in manager.handlers:
            manager.handlers.append(handler)
