"""ONNX files of others: what could run without bound is refused before it is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selcon_plugin.inference.onnx import OnnxNetwork

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

METADATA: dict[str, Any] = {
    "input_size": [8, 4],
    "pixel_mean": [0.0, 0.0, 0.0],
    "pixel_std": [255.0, 255.0, 255.0],
    "interpolation": "bilinear",
    "dimension": 3,
    "preprocessing_inside": False,
}


def tensor(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def integers(name: str, values: list[int]) -> Any:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def model(
    *more: Any, initializers: tuple[Any, ...] = (), functions: tuple[Any, ...] = ()
) -> Any:
    """Build a network of average colors, with more nodes beside it."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        *more,
    ]
    graph = helper.make_graph(
        nodes,
        "colors",
        [tensor("images", "batch", 3, 8, 4)],
        [tensor("features", "batch", 3)],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("other", 1)]
    built = helper.make_model(graph, opset_imports=opsets, functions=functions)
    built.ir_version = 8
    helper.set_model_props(built, {k: json.dumps(v) for k, v in METADATA.items()})
    return built


def endless_loop() -> Any:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["still"]),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            tensor("x"),
        ],
        [helper.make_tensor_value_info("still", onnx.TensorProto.BOOL, []), tensor("y")],
    )
    true = numpy_helper.from_array(np.array(True), "true")
    one = numpy_helper.from_array(np.array(1.0, np.float32), "one")
    loop = helper.make_node("Loop", ["", "true", "one"], ["last"], body=body)
    return model(loop, initializers=(true, one))


def branch() -> Any:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["one"], ["y"])], "then", [], [tensor("y")]
    )
    one = numpy_helper.from_array(np.array(1.0, np.float32), "one")
    true = numpy_helper.from_array(np.array(True), "true")
    node = helper.make_node("If", ["true"], ["z"], then_branch=graph, else_branch=graph)
    return model(node, initializers=(one, true))


def elsewhere(location: str) -> Any:
    found = numpy_helper.from_array(np.zeros(3, np.float32), "kept")
    found.ClearField("raw_data")
    found.data_location = onnx.TensorProto.EXTERNAL
    found.external_data.add(key="location", value=location)
    return model(initializers=(found,))


def hidden_elsewhere() -> Any:
    node = helper.make_node(
        "Constant", [], ["c"], value=elsewhere("x").graph.initializer[0]
    )
    return model(node)


def of_another_library() -> Any:
    return model(helper.make_node("Run", ["images"], ["x"], domain="other"))


def huge(kind: str) -> Any:
    shape = integers("shape", [100_000, 100_000])
    if kind == "ConstantOfShape":
        return model(helper.make_node(kind, ["shape"], ["x"]), initializers=(shape,))
    if kind == "Expand":
        one = numpy_helper.from_array(np.array(1.0, np.float32), "one")
        return model(
            helper.make_node(kind, ["one", "shape"], ["x"]), initializers=(shape, one)
        )
    return model(helper.make_node(kind, [], ["x"], shape=[2**20, 2**20]))


def with_metadata(**changed: Any) -> Any:
    built = model()
    helper.set_model_props(
        built, {k: json.dumps(v) for k, v in (METADATA | changed).items()}
    )
    return built


def wide_input() -> Any:
    built = model()
    built.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 10**9
    return built


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "loop": (endless_loop, "loops or branches.*Loop"),
    "if": (branch, "loops or branches.*If"),
    "external": (
        lambda: elsewhere("../weights.bin"),
        r"kept in another file.*weights\.bin",
    ),
    "absolute": (lambda: elsewhere("/etc/passwd"), r"another file.*/etc/passwd"),
    "hidden": (hidden_elsewhere, "another file"),
    "custom": (of_another_library, r"other\.Run"),
    "zeros": (lambda: huge("ConstantOfShape"), "tensor x .*100000x100000"),
    "expanded": (lambda: huge("Expand"), "tensor x .*100000x100000"),
    "random": (lambda: huge("RandomNormal"), "tensor x .*1048576x1048576"),
    "input": (wide_input, "images has the shape .*1000000000"),
    "size": (lambda: with_metadata(input_size=[10**6, 10**6]), "input_size.*1000000"),
    "std": (lambda: with_metadata(pixel_std=[0, 1, 1]), "pixel_std"),
    "filter": (lambda: with_metadata(interpolation="x"), "interpolation.*'x'"),
    "sides": (lambda: with_metadata(input_size=8), "metadata.*selcon export"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_that_selcon_export_does_not_write_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = REFUSED[case]
    file = tmp_path / "net.onnx"
    file.write_bytes(make().SerializeToString())
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", pytest.fail)
    with pytest.raises(ValueError, match=message) as caught:
        OnnxNetwork(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bounded_network_of_another_program_is_run(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(model().SerializeToString())
    pixels = np.full((2, 8, 4, 3), 255, dtype=np.uint8)
    assert np.allclose(OnnxNetwork(file).embed_pixels(pixels), 1.0)
