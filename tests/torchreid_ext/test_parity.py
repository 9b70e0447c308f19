"""FastReID and torchreid train the same: equal losses and banks from equal beginnings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny import SPEC
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.config.loading import Merger

pytest.importorskip("fastreid")

STEPS = 10
CASES: dict[str, dict[str, Any]] = {
    "SelectiveContrastive": {"num_neighbors": 3, "num_negatives": 20, "warmup_epochs": 1},
    "ClusterContrast": {},
    "SelConCluster": {"num_neighbors": 3, "num_negatives": 20},
}
CLUSTERING = {"eps": 0.7, "min_samples": 2, "k1": 8, "k2": 3}
# The rendered images have this size: neither host has to resize.
SIZE = (128, 64)


class Steps:
    """Losses and images of every step, and whether the optimizer's were fused."""

    fused = False

    def __init__(self, method: nn.Module) -> None:
        self.losses: list[dict[str, float]] = []
        self.index: list[list[int]] = []
        loss = method.loss

        def recorded(embeddings: Any, index: Tensor, *others: Any) -> dict[str, Tensor]:
            losses: dict[str, Tensor] = loss(embeddings, index, *others)
            self.losses.append({name: value.item() for name, value in losses.items()})
            self.index.append(index.tolist())
            return losses

        method.loss = recorded


def train_in_fastreid(root: Path, name: str, output: Path) -> tuple[Any, Steps, Any]:
    from fastreid.config import get_cfg

    from selcon_plugin.fastreid_ext import SelConTrainer, add_selcon_config
    from selcon_plugin.fastreid_ext.config import KEYS
    from selcon_plugin.fastreid_ext.embedding import unwrap

    cfg = add_selcon_config(get_cfg())
    values = {
        "MODEL.META_ARCHITECTURE": "SelCon",
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "build_torchreid_backbone",
        "MODEL.BACKBONE.TORCHREID_NAME": "osnet_x0_25",
        "MODEL.BACKBONE.PRETRAIN": False,
        "MODEL.SELCON.METHOD": name,
        "MODEL.SELCON.NUM_PARTS": 2,
        # The division by 255 that torchreid's ToTensor does: inputs are rounded alike.
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
        "INPUT.SIZE_TRAIN": list(SIZE),
        "INPUT.SIZE_TEST": list(SIZE),
        "DATASETS.NAMES": ("SyntheticPersons",),
        "DATASETS.TESTS": ("SyntheticPersons",),
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.NUM_INSTANCE": 4,
        "SOLVER.OPT": "SGD",
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.BIAS_LR_FACTOR": 1.0,
        "SOLVER.WEIGHT_DECAY": 0.0,
        "SOLVER.WEIGHT_DECAY_NORM": 0.0,
        "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
        "SOLVER.MOMENTUM": 0.9,
        "SOLVER.NESTEROV": False,
        "SOLVER.STEPS": [100],
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.MAX_EPOCH": 2,
        "TEST.IMS_PER_BATCH": 16,
        "OUTPUT_DIR": str(output),
    }
    values |= {f"DATASETS.SYNTHETIC_PERSONS.{k.upper()}": v for k, v in vars(SPEC).items()}
    values |= {f"MODEL.SELCON.{k.upper()}": v for k, v in CASES[name].items()}
    values |= {f"MODEL.SELCON.CLUSTERING.{k.upper()}": v for k, v in CLUSTERING.items()}
    Merger(cfg, KEYS).merge_overrides(values)
    trainer = SelConTrainer(cfg)
    network = unwrap(trainer.model)
    begin = copy.deepcopy(network)
    trainer.resume_or_load(False)
    steps = Steps(network.method)
    results = trainer.train()
    steps.fused = bool(trainer.optimizer.param_groups[0].get("fused"))
    return begin, steps, (network.method, results)


def train_in_torchreid(
    root: Path, name: str, begin: Any, *, fused: bool
) -> tuple[Steps, Any]:
    from selcon_plugin.torchreid_ext import (
        ImageSelConEngine,
        build_selcon_model,
        register_synthetic_persons,
    )

    torchreid = import_torchreid()
    register_synthetic_persons("parity", SPEC)
    datamanager = torchreid.data.ImageDataManager(
        root=str(root),
        sources="parity",
        height=SIZE[0],
        width=SIZE[1],
        batch_size_train=8,
        batch_size_test=16,
        workers=0,
        use_gpu=False,
        transforms=[],
        norm_mean=[0.0, 0.0, 0.0],
        norm_std=[1.0, 1.0, 1.0],
    )
    model = build_selcon_model(
        "osnet_x0_25",
        pretrained=False,
        input_size=SIZE,
        num_parts=begin.heads.num_parts,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[255.0] * 3,
    )
    model.backbone.load_state_dict(begin.backbone.state_dict())
    model.heads.load_state_dict(begin.heads.state_dict())
    optimizer = torchreid.optim.build_optimizer(
        model, optim="sgd", lr=0.01, momentum=0.9, weight_decay=0.0
    )
    for group in optimizer.param_groups:
        group["fused"] = fused  # other steps are rounded differently
    engine = ImageSelConEngine(
        datamanager,
        model,
        optimizer,
        method=name,
        clustering=None if name == "SelectiveContrastive" else CLUSTERING,
        use_gpu=False,
        checkpoint_period=0,
        **CASES[name],
    )
    engine._prepare_network()
    steps = Steps(model.method)
    engine.run(save_dir=str(root / f"log_{name}"), max_epoch=2)
    return steps, (model.method, engine.results["parity"])


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_equal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTREID_DATASETS", str(tmp_path))
    begin, first, (method, results) = train_in_fastreid(tmp_path, name, tmp_path / "out")
    second, (other_method, other_results) = train_in_torchreid(
        tmp_path, name, begin, fused=first.fused
    )
    assert first.index == second.index
    assert len(first.losses) == STEPS
    for here, there in zip(first.losses, second.losses, strict=True):
        assert there == pytest.approx(here, abs=1e-6)
    banks, other_banks = method.state_dict(), other_method.state_dict()
    assert banks.keys() == other_banks.keys()
    for key, bank in banks.items():
        assert torch.allclose(other_banks[key].double(), bank.double(), atol=1e-6), key
    for metric in ("mAP", "Rank-1"):
        assert other_results[metric] == pytest.approx(float(results[metric]), abs=1e-4)
