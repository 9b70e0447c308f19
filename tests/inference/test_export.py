"""Exported networks: the same features outside of PyTorch, or no file."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from selcon_plugin.compat.shared import prepare_torchvision
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.features import GeneralizedMeanPool, GlobalPartEmbedding
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.export import (
    ExportCheck,
    ExportMismatchError,
    check_crops,
    export_onnx,
    export_torchscript,
)
from selcon_plugin.inference.onnx import OnnxNetwork
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.timm import create_timm_backbone

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
prepare_torchvision()  # which timm imports

PREPROCESSING = Preprocessing(
    (64, 32), "bicubic", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
)


class TestFeature(EmbeddingNetwork):
    """Backbone and head, in evaluation mode, as both hosts' networks are."""

    __test__ = False

    def forward(self, images):
        return self.test_feature(self.embed(images))


def build(name="test_resnet", num_parts=2):
    torch.manual_seed(0)
    backbone = create_timm_backbone(name, input_size=(64, 32))
    head = GlobalPartEmbedding(
        backbone.feature_dim, 32, num_parts, pool=GeneralizedMeanPool
    )
    model = TestFeature(
        backbone,
        head,
        PREPROCESSING,
        images_normalized=True,
    )
    model.train()
    model.embed(torch.randn(16, 3, 64, 32))  # batch normalization gets statistics
    return InferenceNetwork(model, PREPROCESSING, method="Mine", host="fastreid")


@pytest.fixture(scope="module")
def network():
    return build()


@pytest.fixture(scope="module")
def crops():
    """Synthetic persons, at sizes that have to be shrunk and enlarged."""
    sizes = [(20, 50), (64, 128), (31, 170), (90, 64)]
    drawn = check_crops(number=22)
    return [crop.resize(sizes[i % len(sizes)]) for i, crop in enumerate(drawn)]


@pytest.fixture(scope="module")
def resized(crops):
    return np.stack([PREPROCESSING.resize(crop) for crop in crops])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_onnx_has_the_features_of_pytorch_in_batches_of_any_size(
    name, crops, resized, tmp_path
):
    network = build(name)
    file = tmp_path / "new" / "net.onnx"
    check = export_onnx(network, file, crops=crops)
    assert check.num_images == 22
    assert check.max_difference < 1e-5
    assert check.min_cosine > 1 - 1e-6
    assert [path.name for path in file.parent.iterdir()] == ["net.onnx"]
    loaded = OnnxNetwork(file)
    for size in (1, 3, 17):
        got = loaded.embed_pixels(resized[:size])
        assert got.shape == (size, network.dim)
        assert np.allclose(got, network.embed_pixels(resized[:size]), atol=1e-5)


def test_onnx_without_the_package_is_used_as_its_metadata_say(network, crops, tmp_path):
    """All that a program in another language would do, from what the file says."""
    file = tmp_path / "net.onnx"
    export_onnx(network, file, crops=crops, license="only mine")
    session = onnxruntime.InferenceSession(str(file))
    said = session.get_modelmeta().custom_metadata_map
    said = {key: json.loads(value) for key, value in said.items()}
    assert (said["channel_order"], said["layout"]) == ("RGB", "NCHW")
    assert (said["license"], said["method"], said["precision"]) == (
        "only mine",
        "Mine",
        "float32",
    )
    assert said["versions"]["torch"] == torch.__version__
    height, width = said["input_size"]
    image = crops[0].resize(
        (width, height), Image.Resampling[said["interpolation"].upper()]
    )
    normal = (np.asarray(image) - np.array(said["pixel_mean"])) / said["pixel_std"]
    batch = normal.transpose(2, 0, 1)[None].astype(np.float32)
    (features,) = session.run(None, {"images": batch})
    assert features.shape == (1, said["dimension"])
    expected = network.embed_pixels(PREPROCESSING.resize(crops[0])[None])
    assert np.allclose(features, expected, atol=1e-5)


def test_preprocessing_inside_is_that_outside(network, crops, resized, tmp_path):
    file = tmp_path / "net.onnx"
    check = export_onnx(network, file, crops=crops, preprocess=True)
    # Where Pillow's sums lie next to a half, single pixels differ by a gray level.
    assert check.max_difference < 1e-3
    expected = network.embed_pixels(resized)
    session = onnxruntime.InferenceSession(str(file))
    for crop, row in zip(crops[:4], expected[:4], strict=True):
        pair = np.stack([np.asarray(crop)] * 2)
        (features,) = session.run(None, {"images": pair})
        assert np.abs(features - row).max() < 1e-3
    # What is resized already, it leaves as it is.
    assert np.allclose(OnnxNetwork(file).embed_pixels(resized), expected, atol=1e-5)


@pytest.mark.parametrize("preprocess", [False, True])
def test_half_precision_is_near_and_half_as_large(network, crops, tmp_path, preprocess):
    full, half = tmp_path / "full.onnx", tmp_path / "half.onnx"
    export_onnx(network, full, crops=crops, preprocess=preprocess)
    check = export_onnx(network, half, crops=crops, preprocess=preprocess, fp16=True)
    assert 1e-6 < check.max_difference < 5e-3
    assert check.min_cosine > 0.9999
    types = {tensor.data_type for tensor in onnx.load(half).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    assert half.stat().st_size < 0.7 * full.stat().st_size
    weight = next(network.network.backbone.parameters())
    assert weight.dtype == torch.float32  # the network itself stays as it was


@pytest.mark.parametrize("preprocess", [False, True])
def test_torchscript_has_the_features_of_pytorch(network, crops, tmp_path, preprocess):
    file = tmp_path / "net.pt"
    check = export_torchscript(network, file, crops=crops, preprocess=preprocess)
    assert check.max_difference < (1e-3 if preprocess else 1e-6)
    extra = {"selcon.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated since torch 2.9
        loaded = torch.jit.load(file, _extra_files=extra)
    assert json.loads(extra["selcon.json"])["preprocessing_inside"] is preprocess
    pixels = np.stack([PREPROCESSING.resize(crop) for crop in crops[:3]])
    images = torch.from_numpy(pixels)
    inputs = images if preprocess else PREPROCESSING.normalize(images)
    assert np.allclose(loaded(inputs), network.embed_pixels(pixels), atol=1e-5)


class Spoilt(nn.Module):
    """Computes something else while it is traced."""

    def __init__(self, network, change):
        super().__init__()
        self.network, self.change = network, change

    def forward(self, images):
        features = self.network(images)
        return features + self.change * torch.jit.is_tracing() * features.roll(1, 1)


@pytest.mark.parametrize("export", [export_onnx, export_torchscript])
def test_what_computes_something_else_is_not_written(network, crops, tmp_path, export):
    file = tmp_path / "net"
    file.write_text("an earlier export")
    spoilt = InferenceNetwork(
        Spoilt(network.network, 0.01), PREPROCESSING, host="torchreid"
    )
    with pytest.raises(ExportMismatchError, match="net is not written: on 22 crops"):
        export(spoilt, file, crops=crops)
    assert file.read_text() == "an earlier export"
    assert list(tmp_path.iterdir()) == [file]
    assert export(spoilt, file, crops=crops, max_difference=0.1).max_difference > 1e-4


def test_batch_that_is_fixed_by_tracing_is_not_written(crops, tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images):
            return images.mean((2, 3)).reshape(len(images), 3) * self.weight

    network = InferenceNetwork(Fixed(), PREPROCESSING, host="torchreid")
    with pytest.raises(Exception, match=r"Reshape|reshape"):
        export_onnx(network, tmp_path / "net.onnx", crops=crops)
    assert not list(tmp_path.iterdir())


def test_comparison_by_hand():
    check = ExportCheck.of(
        np.array([[1, 0], [0.6, 0.8]], np.float32),
        np.array([[1, 0], [0.8, 0.6]], np.float32),
    )
    assert check.num_images == 2
    assert check.max_difference == pytest.approx(0.2)
    assert check.min_cosine == pytest.approx(0.96)
    nan = ExportCheck.of(np.ones((1, 2), np.float32), np.full((1, 2), np.nan, np.float32))
    assert nan.max_difference == np.inf
    other = ExportCheck.of(np.ones((1, 2), np.float32), np.ones((1, 3), np.float32))
    assert other.max_difference == np.inf


def test_crops_are_taken_evenly_from_a_folder(tmp_path):
    for number in range(10):
        Image.new("RGB", (4, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    reds = [crop.getpixel((0, 0))[0] for crop in check_crops(tmp_path, number=4)]
    assert reds == [0, 3, 6, 9]
    assert len(check_crops(tmp_path)) == 10
    with pytest.raises(FileNotFoundError):
        check_crops(tmp_path / "none")


def test_embedder_reads_the_file_back(network, crops, tmp_path):
    expected = Embedder(network)(crops)
    for preprocess in (False, True):
        file = tmp_path / "net.onnx"
        export_onnx(network, file, crops=crops, preprocess=preprocess)
        embedder = Embedder.from_onnx(file)
        assert (embedder.dim, embedder.input_size) == (network.dim, (64, 32))
        assert np.allclose(embedder(crops), expected, atol=1e-5)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx"):
        Embedder.from_onnx(tmp_path / "gone.onnx")
    file = tmp_path / "f.onnx"
    file.write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"f\.onnx cannot be run"):
        Embedder.from_onnx(file)
    helper = onnx.helper
    value = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["images"], ["features"])
    output = helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([node], "g", [value], [output])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), file)
    with pytest.raises(ValueError, match="write it with selcon export"):
        Embedder.from_onnx(file)
