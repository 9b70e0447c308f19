"""A tiny network on a tiny data set: everything real, in seconds on one core."""

import copy
from pathlib import Path

import pytest
from fastreid.config import CfgNode, get_cfg

from helpers.tiny import SPEC
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.fastreid_ext import add_selcon_config

# The smallest convolutional network of timm, at a quarter of the usual input size.
TINY = {
    "MODEL.META_ARCHITECTURE": "SelCon",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "build_timm_backbone",
    "MODEL.BACKBONE.TIMM_NAME": "test_resnet",
    "MODEL.SELCON.NUM_PARTS": 2,
    "MODEL.SELCON.NUM_NEIGHBORS": 3,
    "MODEL.SELCON.NUM_NEGATIVES": 20,
    "MODEL.SELCON.WARMUP_EPOCHS": 1,
    "INPUT.SIZE_TRAIN": [64, 32],
    "INPUT.SIZE_TEST": [64, 32],
    "INPUT.FLIP.ENABLED": True,
    "INPUT.PADDING.ENABLED": True,
    "INPUT.REA.ENABLED": True,
    "DATASETS.NAMES": ("SyntheticPersons",),
    "DATASETS.TESTS": ("SyntheticPersons",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.OPT": "SGD",
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.MAX_EPOCH": 2,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": 2,
} | {f"DATASETS.SYNTHETIC_PERSONS.{k.upper()}": v for k, v in vars(SPEC).items()}


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(root, SPEC)
    return root


@pytest.fixture(scope="session")
def synthetic_persons(dataset_root: Path) -> Path:
    """Folder of the data set, in the form of Market-1501."""
    return generate_synthetic_persons(dataset_root, SPEC)  # there already


@pytest.fixture(autouse=True)
def _use_dataset_root(dataset_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREID_DATASETS", str(dataset_root))


@pytest.fixture
def tiny_cfg(tmp_path: Path) -> CfgNode:
    cfg = add_selcon_config(get_cfg())
    for key, value in copy.deepcopy(TINY).items():
        cfg.merge_from_list([key, value])
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


@pytest.fixture
def tiny_values() -> dict:
    """The tiny config as keys and values, for a command line."""
    return dict(TINY)
