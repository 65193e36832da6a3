"""Graphs brought into the forms that qonnx 1.0 handles: each function names what goes wrong without it."""

from __future__ import annotations

from typing import Any

import onnx

_QUANTIZERS = "qonnx.custom_op.general"


def state_shapes_of_weights(graph: Any) -> None:
    """Note the shape of each quantized weight, in place: without it no shape behind a quantizer can be inferred."""
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.domain == _QUANTIZERS and node.input[0] in shapes:
            shape = list(shapes[node.input[0]])
            graph.value_info.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, shape))


def slice_instead_of_split(graph: Any) -> None:
    """Replace each Split by one Slice an output, in place: qonnx loses all outputs but the first of what it folds."""
    sizes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Split" and len(node.input) == 2 and node.input[1] in sizes:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            nodes += _slices(graph, node, sizes[node.input[1]].cumsum(), axis)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def name_each_input_once(graph: Any) -> None:
    """Put an Identity before an input that a node has twice, in place: qonnx renames the first of the two only."""
    nodes = []
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name and name in node.input[:position]:
                node.input[position] = f"{node.output[0]}_input_{position}"
                nodes.append(onnx.helper.make_node("Identity", [name], [node.input[position]]))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def quantize_transposes_apart(graph: Any) -> None:
    """Give a Transpose its own quantizer where others read the weight too, in place.

    qonnx moves the Transpose in front of the quantizer, and the other readers would get the transposed weight.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for quantizer in [node for node in graph.node if node.domain == _QUANTIZERS and node.input[0] in initializers]:
        readers = [node for node in graph.node if quantizer.output[0] in node.input]
        transposes: dict[str, list[Any]] = {}
        for node in readers:
            if node.op_type == "Transpose":
                transposes.setdefault(str(node.attribute), []).append(node)
        if len(readers) == sum(map(len, transposes.values())) and len(transposes) == 1:
            _merge(graph, readers)
            continue
        for number, alike in enumerate(transposes.values()):
            weight, apart = onnx.TensorProto(), onnx.NodeProto()
            weight.CopyFrom(initializers[quantizer.input[0]])
            apart.CopyFrom(quantizer)
            weight.name = apart.input[0] = f"{weight.name}_transposed_{number}"
            apart.output[0] = f"{apart.output[0]}_transposed_{number}"
            alike[0].input[0] = apart.output[0]
            graph.initializer.append(weight)
            graph.node.insert(list(graph.node).index(quantizer), apart)
            _merge(graph, alike)


def _merge(graph: Any, alike: list[Any]) -> None:
    """Leave the first of several nodes that compute the same, in place."""
    first = alike[0].output[0]
    same = {node.output[0] for node in alike[1:]}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in same:
                node.input[position] = first
    for node in alike[1:]:
        graph.node.remove(node)


def _slices(graph: Any, split: Any, ends: Any, axis: int) -> list[Any]:
    nodes = []
    for output, start, end in zip(split.output, [0, *ends[:-1]], ends, strict=True):
        names = [f"{output}_{bound}" for bound in ("start", "end", "axis")]
        for name, value in zip(names, (start, end, axis), strict=True):
            graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], [int(value)]))
        nodes.append(onnx.helper.make_node("Slice", [split.input[0], *names], [output], name=f"{output}_slice"))
    return nodes
