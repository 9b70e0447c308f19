"""Check of an ONNX file before it is run: a bounded network of standard operators.

onnxruntime runs whatever a file says: loops without an end, operators of other libraries,
tensors of any size, data of other files. ``selcon export`` writes none of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

__all__ = ["check_onnx"]

# Values of one tensor for one image. The largest of a ViT or ResNet has some millions.
_MAX_VALUES = 2**27
_STANDARD = ("", "ai.onnx")
# Size of an image where the file leaves it open.
_OPEN_SIDE = 512
_SHOWN = 3


def check_onnx(onnx: Any, content: bytes, name: str) -> None:
    """Refuse an ONNX file that could run without bound, or read more than itself.

    Args:
        onnx: The package.
        content: Content of the file.
        name: Name of the file in messages.

    Raises:
        ValueError: If it is no valid ONNX file, contains a loop or a branch, an operator of
            another domain, data in another file, or a tensor of absurd size.
    """
    try:
        model = onnx.load_model_from_string(content)
        _refuse_external_data(onnx, model, name)
        onnx.checker.check_model(model)
    except Exception as error:
        if isinstance(error, ValueError):
            raise
        # protobuf and onnx have their own error classes, of no common base class.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} cannot be run as ONNX: {reason}") from error
    _refuse_operators(onnx, model, name)
    _refuse_sizes(onnx, model, name)


def _refuse_external_data(onnx: Any, model: Any, name: str) -> None:
    external = onnx.TensorProto.EXTERNAL
    for tensor in _tensors(onnx, model):
        if tensor.data_location == external or tensor.external_data:
            places = {entry.key: entry.value for entry in tensor.external_data}
            raise ValueError(
                f"{name} keeps the tensor {tensor.name} in another file "
                f"({places.get('location', 'unnamed')}), which is not read: write it as "
                "one file, as selcon export does"
            )


def _refuse_operators(onnx: Any, model: Any, name: str) -> None:
    graphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    nested = [
        node.op_type
        for node in model.graph.node
        if any(attribute.type in graphs for attribute in node.attribute)
    ]
    foreign = [
        f"{node.domain}.{node.op_type}"
        for node in model.graph.node
        if node.domain not in _STANDARD
    ]
    foreign += [f"function {function.name}" for function in model.functions]
    for found, what in (
        (nested, "loops or branches, which may never end"),
        (foreign, "operators that are not of ONNX itself"),
    ):
        if found:
            shown = ", ".join(sorted(set(found))[:_SHOWN])
            raise ValueError(
                f"{name} is not run: it has {what}: {shown}. Write it with selcon export"
            )


def _refuse_sizes(onnx: Any, model: Any, name: str) -> None:
    """Refuse tensors of absurd size, for one image and as far as ONNX can infer them."""
    sized = type(model)()
    sized.CopyFrom(model)
    for value in (*sized.graph.input, *sized.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.WhichOneof("value") != "dim_value":
                dim.dim_value = _OPEN_SIDE if axis else 1
    try:
        inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} is not run: its shapes are invalid: {reason}") from error
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        _refuse_size(value.name, shape, name)
    for tensor in _tensors(onnx, model):
        _refuse_size(tensor.name, list(tensor.dims), name)


def _refuse_size(tensor: str, shape: list[int], name: str) -> None:
    values = math.prod(max(side, 1) for side in shape)
    if values > _MAX_VALUES or any(side < 0 for side in shape):
        raise ValueError(
            f"{name} is not run: its tensor {tensor} has the shape "
            f"{'x'.join(map(str, shape))}, and at most {_MAX_VALUES:,} values are "
            "accepted. Write it with selcon export"
        )


def _tensors(onnx: Any, model: Any) -> Iterator[Any]:
    """List all tensors of a model, also those of nested graphs and functions."""
    yield from _of_graph(onnx, model.graph)
    for function in model.functions:
        yield from _of_nodes(onnx, function.node)


def _of_graph(onnx: Any, graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(onnx, graph.node)


def _of_nodes(onnx: Any, nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (
                *([attribute.g] if attribute.HasField("g") else []),
                *attribute.graphs,
            ):
                yield from _of_graph(onnx, graph)
