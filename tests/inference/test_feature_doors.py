"""Wrong features are refused wherever features come in."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from selcon_plugin.features import BadFeaturesError, check_features
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.folder_features import FolderFeatures
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.retrieval import Index, search
from selcon_plugin.workflows.folder_clusters import cluster_features

DIM = 6
PREPROCESSING = Preprocessing((8, 4), "bicubic", (0.0,) * 3, (1.0,) * 3)


def unit(count, dim=DIM, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def with_value(value):
    def change(rows):
        rows = rows.copy()
        rows[-1, 2] = value
        return rows

    return change


FAULTS = {
    "nan": with_value(np.nan),
    "inf": with_value(np.inf),
    "beyond float32": lambda rows: with_value(1e300)(rows.astype(np.float64)),
    "longer": lambda rows: np.concatenate([rows, rows], axis=1) / 2**0.5,
    "shorter": lambda rows: rows[:, :-1],
    "no dimension": lambda rows: rows[:, :0],
    "too few rows": lambda rows: rows[:-1],
    "too many rows": lambda rows: np.concatenate([rows, rows[:1]]),
    "not unit": lambda rows: 2.0 * rows,
    "zero row": lambda rows: rows * (np.arange(len(rows)) > 0)[:, None],
    "whole numbers": lambda rows: np.eye(len(rows), DIM, dtype=np.int64),
    "booleans": lambda rows: np.eye(len(rows), DIM, dtype=bool),
    "complex": lambda rows: rows.astype(np.complex64),
    "text": lambda rows: rows.astype(str),
    "objects": lambda rows: rows.astype(object),
    "1-D": lambda rows: rows.ravel(),
    "3-D": lambda rows: rows[None],
    "scalar": lambda rows: np.float32(1.0),
    "None": lambda rows: None,
}
# A caller that gives rows determines their number, and for clusters their dimension.
ANY_NUMBER = ("too few rows", "too many rows")
ANY_DIMENSION = ("longer", "shorter")


class Backend:
    """Unit vectors, changed by a fault once it is set."""

    preprocessing = PREPROCESSING
    dim = DIM
    fault = staticmethod(lambda rows: rows)

    def embed_pixels(self, pixels):
        return self.fault(unit(len(pixels)))


class Plain:
    """An embedder of a user, without any check of its own."""

    dim = DIM
    fault = staticmethod(lambda rows: rows)

    def __call__(self, images, *, batch_size=64):
        return self.fault(unit(len(images)))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "crops").mkdir()
    for number in range(4):
        pixels = rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"crops/{number}.png")
    return tmp_path / "crops"


def called(tmp_path, folder, fault):
    backend = Backend()
    backend.fault = fault
    Embedder(backend)([np.zeros((8, 4, 3), np.uint8)] * 4)


def of_folder(tmp_path, folder, fault):
    backend = Backend()
    backend.fault = fault
    Embedder(backend).embed_folder(folder)


def from_file(tmp_path, folder, fault):
    paths = np.array([f"{n}.png" for n in range(4)])
    rows = fault(unit(4))
    rows = np.array(None) if rows is None else rows
    np.savez(tmp_path / "f.npz", paths=paths, camids=np.zeros(4, np.int64), features=rows)
    FolderFeatures.load(tmp_path / "f.npz")


def as_object(tmp_path, folder, fault):
    names = ("a", "b", "c", "d")
    FolderFeatures(names, np.zeros(4, np.int64), fault(unit(4))).save(tmp_path / "f.npz")


def created(tmp_path, folder, fault):
    plain = Plain()
    plain.fault = fault
    Index.create(tmp_path / "index", plain)


def added(tmp_path, folder, fault):
    plain = Plain()
    index = Index.create(tmp_path / "index", plain)
    index.check_network = lambda embedder: None  # a network that fails on these images only
    plain.fault = fault
    try:
        index.add(folder, plain)
    except BadFeaturesError:
        assert len(index) == len(Index.open(tmp_path / "index")) == 0
        raise


def queried(tmp_path, folder, fault):
    index = Index.create(tmp_path / "index", Plain())
    index.add(folder, Plain())
    index.search(fault(unit(4)))


def queried_by_image(tmp_path, folder, fault):
    index, plain = Index.create(tmp_path / "index", Plain()), Plain()
    index.add(folder, plain)
    index.check_network = lambda embedder: None
    plain.fault = fault
    search(index, sorted(folder.iterdir()), embedder=plain)


def clustered(tmp_path, folder, fault):
    cluster_features(fault(unit(12)))


DOORS = {
    called: (),
    of_folder: (),
    from_file: ANY_DIMENSION,
    as_object: ANY_DIMENSION,
    created: (),
    added: (),
    queried: ANY_NUMBER,
    queried_by_image: (),
    clustered: ANY_NUMBER + ANY_DIMENSION,
}


# Python objects are not even read from a file.
UNREADABLE = ((from_file, "None"), (from_file, "objects"))


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_refuses_every_fault(tmp_path, folder, door):
    (tmp_path / "right").mkdir()
    door(tmp_path / "right", folder, lambda rows: rows)
    for number, (name, fault) in enumerate(FAULTS.items()):
        if name in DOORS[door]:
            continue
        place = tmp_path / str(number)
        place.mkdir()
        error = ValueError if (door, name) in UNREADABLE else BadFeaturesError
        with pytest.raises(error, match=r"\w") as raised:
            door(place, folder, fault)
        assert "\n" not in str(raised.value), name


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_all_floating_point_types_are_accepted(dtype):
    rows = unit(5).astype(dtype)
    checked = check_features(rows, source="a", rows=5, dim=DIM)
    assert checked.dtype == np.float32
    assert np.allclose(checked, rows)
    assert np.array_equal(check_features(rows.tolist(), source="a"), checked)
    tensor = torch.from_numpy(rows).requires_grad_()
    assert np.array_equal(check_features(tensor, source="a"), checked)
    half = check_features(torch.from_numpy(rows).bfloat16(), source="a")
    assert np.allclose(half, checked, atol=1e-2)


def test_messages_name_source_row_and_value():
    rows = unit(5)
    rows[3] *= 7
    with pytest.raises(BadFeaturesError, match=r"net\.onnx: 1 of 5 .*row 3 with length 7"):
        check_features(rows, source="net.onnx")
    rows[3] = np.nan
    with pytest.raises(BadFeaturesError, match=r"net\.onnx: 1 of 5 .*not finite.*row 3"):
        check_features(rows, source="net.onnx", unit=False)
    with pytest.raises(BadFeaturesError, match=r"\(5, 7\), got \(5, 6\)"):
        check_features(rows, source="net.onnx", rows=5, dim=7)


def onnx_file(file, values, **metadata):
    """An exported network whose output depends on nothing but the number of images."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    images = helper.make_tensor_value_info("images", types.FLOAT, ["b", 3, 8, 4])
    features = helper.make_tensor_value_info("features", types.FLOAT, ["b", len(values)])
    row = onnx.numpy_helper.from_array(values.astype(np.float32), "row")
    axes = onnx.numpy_helper.from_array(np.array([1, 2, 3]), "axes")
    zero = onnx.numpy_helper.from_array(np.float32([0.0]), "zero")
    nodes = [
        helper.make_node("ReduceSum", ["images", "axes"], ["sums"], keepdims=0),
        helper.make_node("Mul", ["sums", "zero"], ["zeros"]),
        helper.make_node("Unsqueeze", ["zeros", "one"], ["column"]),
        helper.make_node("Add", ["column", "row"], ["features"]),
    ]
    one = onnx.numpy_helper.from_array(np.array([1]), "one")
    graph = helper.make_graph(nodes, "g", [images], [features], [row, axes, zero, one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    known = {
        "input_size": [8, 4],
        "pixel_mean": [0.0] * 3,
        "pixel_std": [1.0] * 3,
        "interpolation": "bicubic",
        "dimension": DIM,
        "preprocessing_inside": False,
    }
    helper.set_model_props(model, {k: json.dumps(v) for k, v in known.items()} | metadata)
    onnx.save(model, file)
    return file


@pytest.mark.parametrize(
    "values",
    [
        np.full(DIM, np.nan),
        np.full(DIM, np.inf),
        np.ones(DIM),
        np.zeros(DIM),
        unit(1, DIM + 1)[0],
        unit(1, DIM - 1)[0],
    ],
)
def test_exported_network_with_wrong_output_is_refused(tmp_path, values):
    right = Embedder.from_onnx(onnx_file(tmp_path / "right.onnx", unit(1)[0]))
    images = [np.zeros((8, 4, 3), np.uint8)] * 3
    assert np.allclose(right(images), unit(1), atol=1e-6)
    wrong = Embedder.from_onnx(onnx_file(tmp_path / "wrong.onnx", values))
    with pytest.raises(BadFeaturesError):
        wrong(images)


@pytest.mark.parametrize("part", ["truncated", "bit", "object"])
def test_damaged_feature_files_are_one_line(tmp_path, part):
    file = tmp_path / "f.npz"
    FolderFeatures(("a", "b"), np.zeros(2, np.int64), unit(2, 64)).save(file)
    content = bytearray(file.read_bytes())
    if part == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif part == "bit":
        content[len(content) // 3] ^= 8
        file.write_bytes(content)
    else:
        np.savez(file, paths=np.array([None]), camids=[0], features=unit(1))
    with pytest.raises(ValueError, match=r"f\.npz.*(selcon extract|got object)"):
        FolderFeatures.load(file)
