"""The exports through Brevitas, and Brevitas' own exporters with our handlers."""

import math

import pytest
import torch
from exported_networks import NETWORKS, RawParameter, weak_network
from torch import nn

import pibinn_plugin as pb
from lightning_modules.solvers.calibrated_amp import CalibratedAMP
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.weights import packed_weights

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("brevitas")
pytest.importorskip("onnxoptimizer")
pytest.importorskip("qonnx")

import brevitas.nn as qnn  # noqa: E402
import brevitas.quant as stock  # noqa: E402
from brevitas import config  # noqa: E402
from brevitas.export import export_onnx_qcdq, export_qonnx, export_torch_qcdq  # noqa: E402
from brevitas.export.inference import quant_inference_mode  # noqa: E402
from brevitas.export.onnx.qonnx.handler import BrevitasWeightQuantProxyHandler  # noqa: E402
from brevitas.export.onnx.qonnx.manager import QONNXManager  # noqa: E402
from brevitas.export.onnx.standard.qcdq.handler import StdQCDQCastONNXWeightQuantProxyHandler  # noqa: E402
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager  # noqa: E402
from qonnx.util.cleanup import cleanup  # noqa: E402

from pibinn_plugin.export import onnx as onnx_format  # noqa: E402
from pibinn_plugin.export import qonnx as qonnx_format  # noqa: E402
from pibinn_plugin.schemes import brevitas_export  # noqa: E402
from pibinn_plugin.schemes.brevitas import (  # noqa: E402
    PIBiNNWeightQuantProxy,
    QuantBandedLinear,
    QuantBlockDiagonalLinear,
)

FORMATS = ("qonnx", "qcdq")
# Networks with a weight that holds its structural zeros, in one of the layers that qonnx has.
MASKED = (
    "bitmap",
    "sparse_rows",
    "tiles",
    "masked_band",
    "masked_blocks",
    "empty_block",
    "convolutions",
    "masked_ista",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_qonnx_of_weak_latents_is_the_network(name, tmp_path):
    model, x = weak_network(name)
    path = pb.export(model, tmp_path / "net.onnx", (x,), "qonnx")
    y = torch.randn_like(x)
    torch.testing.assert_close(qonnx_format.runner(path)((y,))[0], model(y), rtol=1e-4, atol=1e-6)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    # A weight has one bit, or, with structural zeros in it, two; nothing is computed of it afterwards.
    quantizers = operators.count("BipolarQuant") + operators.count("Quant")
    assert quantizers == len(packed_weights(pb.convert(model)))
    assert ("Quant" in operators) == (name in MASKED)
    if not name.endswith("ista") and name not in ("hidden_lista", "band"):  # a compact band is multiplied by elements
        assert "Mul" not in operators


def test_a_weight_that_is_read_as_it_is_and_transposed_is_quantized_in_both(tmp_path):
    """CalibratedAMP reads the weight outside its layer, and multiplies by it and by its transpose."""
    model = pb.prepare(CalibratedAMP(16, 32, pb.BlockDiagonal(2), layers=3).eval(), {"operator.weight": None})
    x = torch.randn(3, 16)
    path = pb.export(model, tmp_path / "net.onnx", (x,), "qonnx")
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node].count("BipolarQuant") == 2
    assert sum(math.prod(tensor.dims) for tensor in graph.initializer) < 2 * 256 + 300
    y = torch.randn_like(x)
    torch.testing.assert_close(qonnx_format.runner(path)((y,))[0], model(y), rtol=1e-4, atol=1e-6)


def test_nothing_is_left_for_qonnx_to_fold(tmp_path, monkeypatch):
    """Its folding infers the shapes of the graph once a constant: minutes for a network of some hundred nodes."""
    graphs = []
    clean_up = qonnx_format.cleanup_model
    monkeypatch.setattr(qonnx_format, "cleanup_model", lambda model: graphs.append(model.graph) or clean_up(model))
    model, x = weak_network("coupled_ista")
    pb.export(model, tmp_path / "net.onnx", (x,), "qonnx")
    known = {tensor.name for tensor in graphs[0].initializer}
    left = [node.op_type for node in graphs[0].node if known.issuperset(filter(None, node.input))]
    assert len([name for name in left if name != "BipolarQuant"]) <= 1


@pytest.mark.parametrize("name", NETWORKS)
def test_qcdq_of_weak_latents_is_the_network(name, tmp_path):
    model, x = weak_network(name)
    path = pb.export(model, tmp_path / "net.onnx", (x,), "qcdq")
    y = torch.randn_like(x)
    torch.testing.assert_close(onnx_format.runner(path)((y,))[0], model(y), rtol=1e-4, atol=1e-6)
    assert onnx.TensorProto.INT8 in [tensor.data_type for tensor in onnx.load(path).graph.initializer] + [
        attribute.t.data_type for node in onnx.load(path).graph.node for attribute in node.attribute
    ]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scheme", ["torchao", "brevitas"])
def test_from_other_schemes(scheme, format, tmp_path):
    pytest.importorskip(scheme)
    for name in ("masked_band", "coupled_ista", "hidden_lista"):
        model, x = weak_network(name, scheme)
        pb.export(model, tmp_path / "net.onnx", (x,), format)


def quantized_activations():
    """Brevitas layers with activation and bias quantizers, compact and not."""
    torch.manual_seed(0)
    stock_weight = {"weight_quant": stock.Int8WeightPerTensorFloat, "bias_quant": stock.Int32Bias}
    model = nn.Sequential(
        qnn.QuantIdentity(act_quant=stock.Int8ActPerTensorFloat, return_quant_tensor=True),
        qnn.QuantLinear(16, 12, bias=True, **stock_weight),
        qnn.QuantReLU(return_quant_tensor=True),
        qnn.QuantLinear(12, 8, bias=True, **stock_weight),
        QuantBlockDiagonalLinear(8, 8, 2, input_quant=stock.Int8ActPerTensorFloat),
        QuantBandedLinear(8, 8, 1, 0, bias=False, input_quant=stock.Int8ActPerTensorFloat),
    )
    names = {"1.weight": pb.Mask(torch.rand(12, 16) < 0.5), "4.weight": None, "5.weight": None}
    pb.prepare(model, names, scheme="brevitas")
    model(torch.randn(64, 16))  # calibrates the activation quantizers
    return model.eval(), torch.randn(4, 16)


@pytest.mark.parametrize("format", [*FORMATS, "onnx", "pt2"])
def test_activation_quantizers_are_kept(format, tmp_path):
    model, x = quantized_activations()
    before = model(x)
    pb.export(model, tmp_path / "net.pt2", (x,), format)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("format", FORMATS)
def test_what_brevitas_has_no_layer_for_is_named(format, tmp_path):
    raw = pb.prepare(nn.Sequential(RawParameter()), {"0.weight": None})
    with pytest.raises(pb.ExportError, match="weight' cannot be written through Brevitas"):
        pb.export(raw, tmp_path / "net.onnx", (torch.randn(2, 32),), format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_a_hooked_layer_is_written_with_its_hook(format, tmp_path):
    hooked = nn.Sequential(nn.Linear(32, 4))
    hooked[0].register_forward_hook(lambda module, inputs, output: output + 1)
    pb.prepare(hooked, {"0.weight": None})
    pb.export(hooked, tmp_path / "net.onnx", (torch.randn(2, 32),), format)  # compared with the prepared model


@pytest.mark.parametrize("format", FORMATS)
def test_a_failed_export_leaves_model_and_brevitas_usable(format, tmp_path):
    class Untraceable(nn.Module):
        works = False

        def forward(self, x):
            if not self.works and config._ONGOING_EXPORT is not None:
                raise RuntimeError("not today")
            return x

    model = nn.Sequential(nn.Linear(32, 16), Untraceable(), nn.Linear(16, 4))
    pb.prepare(model, {"*.weight": None}, scheme="brevitas")
    x = torch.randn(3, 32)
    before = model(x)
    with pytest.raises(pb.ExportError, match="not today"):
        pb.export(model, tmp_path / "net.onnx", (x,), format)
    assert not list(tmp_path.iterdir()) and torch.equal(model(x), before) and config._ONGOING_EXPORT is None
    Untraceable.works = True
    pb.export(model, tmp_path / "net.onnx", (x,), format)
    assert torch.equal(model(x), before)


class StockQONNXHandler(BrevitasWeightQuantProxyHandler):
    handled_layer = PIBiNNWeightQuantProxy


class StockQCDQHandler(StdQCDQCastONNXWeightQuantProxyHandler):
    handled_layer = PIBiNNWeightQuantProxy


def qonnx_by_brevitas(model, x, path):
    export_qonnx(model, args=x, export_path=str(path), dynamo=False, keep_initializers_as_inputs=False)
    cleanup(str(path), out_file=str(path))
    return qonnx_format.runner(path)((x,))[0]


def qcdq_by_brevitas(model, x, path):
    export_onnx_qcdq(model, args=x, export_path=str(path), dynamo=True, opset_version=18, optimize=True)
    return onnx_format.runner(path)((x,))[0]


@pytest.mark.parametrize(
    ("export", "manager", "stock_handler"),
    [(qonnx_by_brevitas, QONNXManager, StockQONNXHandler), (qcdq_by_brevitas, StdQCDQONNXManager, StockQCDQHandler)],
)
def test_stock_handlers_are_silently_wrong_and_ours_are_not(export, manager, stock_handler, tmp_path, monkeypatch):
    """Mutation: with Brevitas' stock handlers in the place of ours, weak latents round to zero without an error."""
    model, x = weak_network("masked_band", "brevitas")
    model = nn.Sequential(model[0])  # one masked layer: no weight of it has |V / λ| > 0.5
    ours = [handler for handler in manager.handlers if not hasattr(brevitas_export, handler.__name__)]
    monkeypatch.setattr(manager, "handlers", ours)
    brevitas_export.register(PIBiNNWeightQuantProxy)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(export(model, x, tmp_path / "ours.onnx"), expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(manager, "handlers", [*ours[:-1], stock_handler])
    wrong = export(model, x, tmp_path / "stock.onnx")
    assert (wrong - expected).abs().max() > 0.1 * expected.abs().max()


class UnsignedHandler(brevitas_export.QONNXHandler):
    def prepare_for_export(self, module):
        super().prepare_for_export(module)
        self.masked = module.tracked_module_list[0].quant_weight().value.abs()


def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    """Mutation: a handler that forgets the signs."""
    monkeypatch.setattr(brevitas_export, "_HANDLERS", ())
    handlers = [handler for handler in QONNXManager.handlers if handler is not brevitas_export.QONNXHandler]
    monkeypatch.setattr(QONNXManager, "handlers", [*handlers, UnsignedHandler])
    model, x = weak_network("masked_band")
    with pytest.raises(pb.ExportError, match="differs from the network by"):
        pb.export(model, tmp_path / "net.onnx", (x,), "qonnx")
    assert not list(tmp_path.iterdir())


def test_torch_qcdq_and_quant_inference_mode():
    brevitas_export.register(PIBiNNWeightQuantProxy)
    model, x = weak_network("masked_band", "brevitas")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(export_torch_qcdq(model, args=x)(x), expected)
        with quant_inference_mode(model):
            model(x)
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_handlers_are_registered_once():
    brevitas_export.register(PIBiNNWeightQuantProxy)
    counts = [len(manager.handlers) for manager, _ in brevitas_export._HANDLERS]
    brevitas_export.register(PIBiNNWeightQuantProxy)
    assert [len(manager.handlers) for manager, _ in brevitas_export._HANDLERS] == counts


def test_a_compact_layer_that_computes_something_of_its_own_is_not_taken_for_a_stock_one(tmp_path):
    class Doubled(CompactLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    structure = pb.Mask(torch.eye(8).roll(1, 0) + torch.eye(8))  # which Brevitas' exporters write as a dense layer only
    for layer, is_written in ((CompactLinear(8, 8, structure), True), (Doubled(8, 8, structure), False)):
        model = pb.prepare(nn.Sequential(layer), {"0.weight": None})
        if is_written:
            pb.export(model, tmp_path / "net.onnx", (torch.randn(2, 8),), "qcdq")
        else:
            with pytest.raises(pb.ExportError, match="structure that Brevitas' exporters cannot write"):
                pb.export(model, tmp_path / "net.onnx", (torch.randn(2, 8),), "qcdq")
