"""A default never fails where another value would work: runs with defaults on tiny data."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.engine.batches import fitting_batch_size
from selcon_plugin.engine.network import usable_parts
from selcon_plugin.features import Embeddings, most_parts
from selcon_plugin.hosts import get_host, host_names
from selcon_plugin.methods import build_method, method_class, method_names
from selcon_plugin.workflows.train import train

FAST = ("SelectiveContrastive", "SelConCluster", "ClusterContrast")
# Only what a run on a folder without a GPU must say; the images are 64x32.
SETTINGS: dict[str, dict[str, Any]] = {
    "fastreid": {
        "MODEL.META_ARCHITECTURE": "SelCon",
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.BACKBONE.TIMM_NAME": "test_resnet",
        "INPUT.SIZE_TRAIN": [64, 32],
        "INPUT.SIZE_TEST": [64, 32],
        "DATASETS.NAMES": ("ImageFolderReID",),
        "DATASETS.TESTS": (),
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.MAX_EPOCH": 1,
    },
    "torchreid": {
        "use_gpu": False,
        "model.name": "timm:test_resnet",
        "model.pretrained": False,
        "data.height": 64,
        "data.width": 32,
        "data.workers": 0,
        "data.sources": ["imagefolderreid"],
        "data.targets": [],
        "train.max_epoch": 1,
    },
}
ROOT = {"fastreid": "DATASETS.IMAGE_FOLDER.ROOT", "torchreid": "image_folder.root"}


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of two persons from one camera."""
    folder = tmp_path_factory.mktemp("crops")
    rng = np.random.default_rng(0)
    for person in range(2):
        blocks = rng.integers(0, 255, (4, 2, 3))
        for number in range(4):
            pixels = np.kron(blocks, np.ones((16, 16, 1))) + rng.integers(
                0, 30, (64, 32, 3)
            )
            picture = Image.fromarray(pixels.clip(0, 255).astype("uint8"))
            picture.save(folder / f"{person:04d}_c1_{number}.png")
    return folder


@pytest.fixture
def warnings_of() -> Iterator[list[str]]:
    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    found: list[str] = []
    collector, logger = Collector(), logging.getLogger("selcon_plugin")
    logger.addHandler(collector)
    yield found
    logger.removeHandler(collector)


def cases() -> list[Any]:
    return [
        pytest.param(host, name, marks=[] if name in FAST else [pytest.mark.slow])
        for host in host_names()
        for name in method_names()
        if not method_class(name).needs_cameras
    ]


@pytest.mark.parametrize(("host_name", "method"), cases())
def test_defaults_train_on_eight_images_of_one_camera(
    host_name: str, method: str, crops: Path, tmp_path: Path, warnings_of: list[str]
) -> None:
    if importlib.util.find_spec(host_name) is None:
        pytest.skip(f"{host_name} is not installed")
    host = get_host(host_name)
    keys = {ROOT[host_name]: str(crops), host.run_keys.output: str(tmp_path / "out")}
    keys[f"{host.keys.path}.{host.keys.case('method')}"] = method
    train(host, host.load_config("", overrides={**SETTINGS[host_name], **keys}))
    assert not [text for text in warnings_of if "NUM_NEG" in text or "batch size" in text]


@pytest.mark.parametrize("name", ["SelectiveContrastive", "SelConCluster"])
def test_default_counts_are_bounded_without_a_warning(
    name: str, warnings_of: list[str]
) -> None:
    for own, warned in (({}, False), ({"num_negatives": 37}, True)):
        warnings_of.clear()
        method: Any = build_method(name, 24, 8, warmup_epochs=0, **own)
        features = torch.nn.functional.normalize(torch.randn(24, 8), dim=1)
        labels = PseudoLabels.numbered([number // 6 for number in range(24)])
        method.prepare(Embeddings(features), None, labels)
        index = torch.arange(4)
        method.loss(Embeddings(features[:4]), index, torch.full((4,), -1))
        assert any("NUM_NEGATIVES" in text for text in warnings_of) == warned


@pytest.mark.parametrize(
    ("rows", "dim", "parts"),
    [(16, 512, 8), (4, 512, 4), (2, 96, 2), (1, 64, 0), (9, 100, 5)],
)
def test_default_parts_are_what_fits(rows: int, dim: int, parts: int) -> None:
    assert most_parts(rows, dim) == parts
    backbone = nn.Conv2d(3, dim, 8, stride=8)
    found = usable_parts(backbone, (8 * rows, 16), "SelectiveContrastive", "auto")
    assert found == (dim, parts)
    assert usable_parts(backbone, (64, 16), "ClusterContrast", "auto")[1] == 0
    if 1 < rows < 8:
        with pytest.raises(ValueError, match=rf"{rows} rows into 8"):
            usable_parts(backbone, (8 * rows, 16), "SelectiveContrastive", 8)


@pytest.mark.parametrize(
    ("batch_size", "num_images", "options", "expected"),
    [
        (64, 8, {}, 8),
        (64, 100, {}, 64),
        (32, 8, {}, 32),  # a person's choice
        (64, 11, {"sampler": "pk"}, 8),
        (64, 11, {"world_size": 2}, 10),
        (64, 3, {"sampler": "pk"}, 64),  # refused later, with the reason
        (64, 30, {"sampler": "pk", "micro_batches": 2, "world_size": 2}, 16),
    ],
)
def test_default_batch_is_what_the_images_fill(
    batch_size: int, num_images: int, options: dict[str, Any], expected: int
) -> None:
    defaults: dict[str, Any] = {"sampler": "stream", "num_instances": 4, "key": "SIZE"}
    assert fitting_batch_size(batch_size, 64, num_images, **{**defaults, **options}) == (
        expected
    )
