"""A data set of a few synthetic persons, and options of the smallest runs on it."""

from __future__ import annotations

from typing import Any

from selcon_plugin.datasets import SyntheticPersonsSpec

# FastReID's evaluation needs ten gallery images per query.
SPEC = SyntheticPersonsSpec(
    num_train_ids=8, num_test_ids=4, images_per_id=5, num_cameras=3, num_distractors=3
)

FASTREID: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "SelCon",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "build_timm_backbone",
    "MODEL.BACKBONE.TIMM_NAME": "test_resnet",
    "MODEL.BACKBONE.PRETRAIN": False,
    "MODEL.SELCON.NUM_PARTS": 2,
    "INPUT.SIZE_TRAIN": "[64,32]",
    "INPUT.SIZE_TEST": "[64,32]",
    "DATASETS.NAMES": "('SyntheticPersons',)",
    "DATASETS.TESTS": "('SyntheticPersons',)",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 8,
} | {f"DATASETS.SYNTHETIC_PERSONS.{key.upper()}": v for key, v in vars(SPEC).items()}

TORCHREID: dict[str, Any] = {
    "use_gpu": False,
    "model.name": "timm:test_resnet",
    "model.pretrained": False,
    "data.sources": "['syntheticpersons']",
    "data.targets": "['syntheticpersons']",
    "data.height": 64,
    "data.width": 32,
    "data.workers": 0,
    "train.batch_size": 8,
    "selcon.num_parts": 2,
} | {f"synthetic_persons.{key}": value for key, value in vars(SPEC).items()}
