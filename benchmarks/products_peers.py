"""The dense peers of ``products.py``: float, sparse and few-bit layers of the same dense shape."""

import copy
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Function = Callable[[], object]
BLOCK = 32  # columns that share a scale in MatMulNBits


def dense_peers(weight: Tensor, x: Tensor, sizes: tuple[int, int, int]) -> dict[str, Function]:
    """Every dense peer of a layer that this machine can run, by name."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    peers: dict[str, Function] = {"nn.Linear fp32": lambda: layer(x)}
    side = min(sizes[1:])  # MKL takes square tiles only
    sparse, columns = weight.to_sparse_bsr((side, side)), x.T.contiguous()
    peers["sparse BSR"] = lambda: sparse @ columns
    return {**peers, **_torchao_peers(layer, x), **_onnx_peers(weight, x)}


def _torchao_peers(layer: nn.Linear, x: Tensor) -> dict[str, Function]:
    logging.disable(logging.WARNING)
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )

    peers = {}
    for name, config in (
        ("torchao int8", Int8WeightOnlyConfig()),
        ("torchao int8 × int8", Int8DynamicActivationInt8WeightConfig()),
        ("torchao int4", IntxWeightOnlyConfig(torch.int4)),
    ):
        model = nn.Sequential(copy.deepcopy(layer))
        quantize_(model, config)
        peers[name] = lambda model=model: model(x)
    return peers


def _onnx_peers(weight: Tensor, x: Tensor) -> dict[str, Function]:
    from onnx import helper, numpy_helper

    rows, columns = weight.shape
    matrix = numpy_helper.from_array(np.ascontiguousarray(weight.numpy().T), "w")
    peers = {"onnxruntime fp32": _session(helper.make_node("MatMul", ["x", "w"], ["y"]), [matrix], weight, x)}
    for bits in (4, 2):
        packed = np.random.randint(256, size=(rows, columns // BLOCK, BLOCK * bits // 8), dtype=np.uint8)
        scales = np.full(rows * columns // BLOCK, 0.1, dtype=np.float32)
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
        tensors = [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")]
        peers[f"MatMulNBits {bits} bit"] = _session(node, tensors, weight, x)
    return peers


def _session(node: object, tensors: list, weight: Tensor, x: Tensor) -> Function:
    import onnxruntime
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "product",
        [value("x", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [value("y", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)
