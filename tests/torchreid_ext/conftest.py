"""A tiny network on a tiny data set in torchreid: everything real, on one core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import BATCH, CLUSTERING, NETWORK
from helpers.tiny import SPEC
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.torchreid_ext import (
    ImageSelConEngine,
    build_selcon_model,
    register_image_folder,
    register_synthetic_persons,
)

SCL = {"num_neighbors": 3, "num_negatives": 20, "warmup_epochs": 1}


torchreid: Any = import_torchreid()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(root, SPEC)
    register_synthetic_persons("few", SPEC)
    return root


@pytest.fixture
def manager(data_root: Path) -> Callable[..., Any]:
    """Make a data manager."""

    def make(**changes: Any) -> Any:
        options = {
            "sources": "few",
            "height": 64,
            "width": 32,
            "batch_size_train": BATCH,
            "batch_size_test": 16,
            "workers": 0,
            "use_gpu": False,
            "transforms": ["random_flip", "random_crop", "random_erase"],
        }
        return torchreid.data.ImageDataManager(
            root=str(data_root), **{**options, **changes}
        )

    return make


@pytest.fixture
def make_engine(manager: Callable[..., Any]) -> Callable[..., ImageSelConEngine]:
    """Make an engine around the smallest network of timm, with two parts."""

    def make(
        *,
        datamanager: Any = None,
        model: Any = None,
        method: str = "SelectiveContrastive",
        scheduler: str = "cosine",
        **options: Any,
    ) -> ImageSelConEngine:
        torch.manual_seed(0)
        if model is None:
            model = build_selcon_model(
                NETWORK, pretrained=False, input_size=(64, 32), num_parts=2
            )
        optimizer = torchreid.optim.build_optimizer(model, optim="sgd", lr=0.02)
        schedule = torchreid.optim.build_lr_scheduler(
            optimizer, lr_scheduler=scheduler, max_epoch=4
        )
        if method == "SelectiveContrastive":
            options = {**SCL, **options}
        else:
            options.setdefault("clustering", CLUSTERING)
        return ImageSelConEngine(
            datamanager or manager(),
            model,
            optimizer,
            schedule,
            method=method,
            use_gpu=False,
            **options,
        )

    return make


@pytest.fixture
def folder_source(data_root: Path) -> str:
    """The training images without identities and cameras, as a source of torchreid."""
    (folder,) = data_root.rglob("bounding_box_train")
    register_image_folder("crops", folder)
    return "crops"
