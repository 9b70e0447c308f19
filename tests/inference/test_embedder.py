"""``Embedder`` without a host: features by definition, folders, files."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers.networks import RowMeans
from selcon_plugin.datasets.reading import ImageReadError, read_rgb
from selcon_plugin.engine.image_check import BadImagesError
from selcon_plugin.hosts import find_config
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.folder_features import FolderFeatures
from selcon_plugin.models.inference import InferenceNetwork, load_all_tensors
from selcon_plugin.models.pillow_resize import PillowResize
from selcon_plugin.models.preprocessing import Preprocessing

MEAN, STD = (10.0, 20.0, 30.0), (2.0, 4.0, 5.0)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture
def embedder():
    preprocessing = Preprocessing((8, 4), "bicubic", MEAN, STD)
    return Embedder(InferenceNetwork(RowMeans(), preprocessing, host="fastreid"))


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 20, 12, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, pixels):
    for number, image in enumerate(pixels):
        camera = tmp_path / "images" / f"cam{number % 2}"
        camera.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(camera / f"{number}.png")
    return tmp_path / "images"


def by_definition(image):
    """Resize, normalize, embed and scale to unit length, one image, in NumPy."""
    resized = np.asarray(Image.fromarray(image).resize((4, 8), FILTERS["bicubic"]))
    normal = (resized.astype(np.float64) - MEAN) / STD
    vector = np.concatenate([normal.mean((0, 1)), normal[:4].mean((0, 1))])
    return vector / np.linalg.norm(vector)


def test_features_are_those_of_the_definition(embedder, pixels):
    expected = np.stack([by_definition(image) for image in pixels])
    for batch_size in (1, 2, 64):
        got = embedder(list(pixels), batch_size=batch_size)
        assert got.dtype == np.float32
        assert np.allclose(got, expected, atol=1e-6)
    assert (embedder.dim, embedder.input_size) == (6, (8, 4))
    assert embedder([]).shape == (0, 6)


def test_paths_pillow_images_and_arrays_are_the_same_images(embedder, pixels, tmp_path):
    file = tmp_path / "one.png"
    Image.fromarray(pixels[0]).save(file)
    forms = [file, str(file), Image.fromarray(pixels[0]), pixels[0]]
    features = embedder(forms)
    assert (features == features[0]).all()
    flipped = embedder([pixels[0][..., ::-1]])  # a view with negative strides: BGR
    assert not np.allclose(flipped, features[0], atol=1e-3)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_of_another_form_are_refused(embedder, image):
    with pytest.raises(ValueError, match="uint8 RGB array of shape"):
        embedder([image])


def test_mistakes_are_said(embedder, tmp_path):
    with pytest.raises(ValueError, match="must be a list"):
        embedder("one.png")
    with pytest.raises(ValueError, match="batch_size"):
        embedder([], batch_size=0)
    with pytest.raises(ImageReadError, match=r"gone\.png"):
        embedder([tmp_path / "gone.png"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        Embedder.from_checkpoint("nowhere.pth")
    weights = tmp_path / "w.pth"
    torch.save({"x": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="--config-file"):
        Embedder.from_checkpoint(weights)
    with pytest.raises(ValueError, match="give only one"):
        Embedder.from_checkpoint(weights, backbone="osnet_x0_25", config_file="c.yml")
    with pytest.raises(ValueError, match="device"):
        Embedder.from_checkpoint(weights, backbone="osnet_x0_25", device="abacus")


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_gives_paths_cameras_and_features(embedder, folder, pixels, workers):
    found = embedder.embed_folder(folder, batch_size=2, num_workers=workers)
    numbers = [int(re.search(r"(\d)\.png", path)[1]) for path in found.paths]
    assert numbers == [0, 2, 4, 1, 3]
    assert found.camids.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(found.features, embedder(list(pixels[numbers])))
    unknown = embedder.embed_folder(folder, camera_pattern="none")
    assert unknown.camids.tolist() == [-1] * 5
    part = embedder.embed_folder(folder, camera_pattern=r"cam\d/([1-4])")
    assert part.camids.tolist() == [-1, 1, 3, 0, 2]


def test_unreadable_images_are_left_out_up_to_a_ratio(embedder, folder, caplog):
    (folder / "cam0" / "2.png").write_bytes(b"no image")
    found = embedder.embed_folder(folder, batch_size=1, max_unreadable_ratio=0.2)
    assert len(found.paths) == len(found.features) == len(found.camids) == 4
    assert "1 of 5 images cannot be read" in caplog.text
    assert "2.png" in caplog.text
    with pytest.raises(BadImagesError, match=r"2\.png"):
        embedder.embed_folder(folder, max_unreadable_ratio=0.1)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(BadImagesError):
        embedder.embed_folder(folder, max_unreadable_ratio=1.0)


def test_features_are_saved_and_loaded(tmp_path):
    features = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    saved = FolderFeatures(("a", "b", "ü"), np.array([0, -1, 1]), features)
    file = tmp_path / "new" / "features.of.mine"
    saved.save(file)
    loaded = FolderFeatures.load(file)
    assert loaded.paths == saved.paths
    assert np.array_equal(loaded.camids, saved.camids)
    assert np.array_equal(loaded.features, features)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_other_files_are_no_features(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderFeatures.load(tmp_path / "none.npz")
    file = tmp_path / "f.npz"
    file.write_text("hello")
    with pytest.raises(ValueError, match="not a feature file"):
        FolderFeatures.load(file)
    np.savez(file, paths=np.array(["a"]))
    with pytest.raises(ValueError, match="not a feature file"):
        FolderFeatures.load(file)
    np.savez(file, paths=np.array(["a"]), camids=np.zeros(2), features=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="one feature and camera per path"):
        FolderFeatures.load(file)


def test_config_is_found_where_either_host_leaves_it(tmp_path):
    config = tmp_path / "config.yaml"
    assert find_config(tmp_path / "model_final.pth") == ""
    config.touch()
    assert find_config(tmp_path / "model_final.pth") == str(config)
    assert find_config(tmp_path / "model" / "model.pth.tar-2") == str(config)
    assert find_config(tmp_path / "other" / "model.pth.tar-2") == ""


def test_network_must_be_loaded_whole():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    load_all_tensors(model, {**old, "classifier.weight": torch.ones(1)}, source="f")
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])
    del old["2.bias"]
    with pytest.raises(ValueError, match=r"1 of 9 .*2\.bias"):
        load_all_tensors(model, old, source="f")
    load_all_tensors(model, old, source="f", ignore_prefixes=("2.",))
    with pytest.raises(ValueError, match=r"0\.bias"):
        load_all_tensors(model, {**state, "0.bias": torch.ones(5)}, source="f")
    with pytest.raises(FloatingPointError):
        load_all_tensors(
            model, {**state, "0.bias": torch.full((4,), torch.nan)}, source="f"
        )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("height", [31, 64, 77, 129, 300])
def test_resize_is_pillows_up_to_a_rounding(interpolation, height):
    generator = np.random.default_rng(height)
    for width in (20, 32, 64, 200):
        # Gray levels and the extremes, where bicubic filters overshoot.
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image[: height // 2] = np.where(image[: height // 2] < 128, 0, 255)
        expected = Image.fromarray(image).resize((32, 64), FILTERS[interpolation])
        resized = PillowResize((64, 32), interpolation)(torch.from_numpy(image)[None])
        got = resized[0].permute(1, 2, 0).numpy()
        difference = np.abs(got - np.asarray(expected).astype(np.float32))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.02


def test_a_picture_has_one_feature_by_every_door(embedder, tmp_path):
    """16 bits, transparency and rotation: by path, in memory, as bytes, in a folder."""
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.random.default_rng(3).integers(0, 2**16, (20, 12), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png", exif=exif)
    rgba = np.random.default_rng(4).integers(0, 256, (20, 12, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "clear.png", exif=exif)
    Image.fromarray(rgba[..., :3]).convert("CMYK").save(tmp_path / "ink.jpg", exif=exif)
    in_folder = embedder.embed_folder(tmp_path)
    for file, feature in zip(in_folder.paths, in_folder.features, strict=True):
        with Image.open(file) as opened, open(file, "rb") as stream:
            content = stream.read()
            doors = [file, opened, opened.copy(), content, np.asarray(read_rgb(file))]
            assert (embedder(doors) == feature).all()


def test_one_image_as_bytes_is_no_list(embedder):
    with pytest.raises(ValueError, match=r"pass \[image\]"):
        embedder(b"content")


def test_images_are_a_list_in_any_form(embedder, pixels, tmp_path):
    right = embedder(list(pixels))
    for form in (tuple(pixels), iter(pixels), (p for p in pixels), pixels):
        assert np.array_equal(embedder(form), right)
    for one in (
        pixels[0],
        pixels[0, 0],
        Image.fromarray(pixels[0]),
        "a.jpg",
        tmp_path,
        None,
    ):
        with pytest.raises(ValueError, match=r"images must be a list.*pass \["):
            embedder(one)
    for batch_size in (0, 1.5, "4", None):
        with pytest.raises(ValueError, match="batch_size must be a whole number >= 1"):
            embedder(list(pixels), batch_size=batch_size)
