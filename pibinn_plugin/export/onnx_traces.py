"""Remove from ONNX files what torch and its exporter note about themselves: most of the bytes of a small network."""

from typing import Any


def strip_traces(model: Any) -> None:
    """Delete metadata, documentation and the shapes of intermediate values of an ``onnx.ModelProto``, in place."""
    graph = model.graph
    del graph.value_info[:]
    for holder in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""
