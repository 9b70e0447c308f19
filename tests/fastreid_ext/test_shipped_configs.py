"""FastReID's shipped configs train by one line, resume bit-identical and are exported.

The wheel of FastReID has no configs. Here are their settings that decide the network, the
optimizer and the schedule, with tiny inputs and two epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastreid.config import CfgNode

from helpers.plain_hosts import as_market, map_by_host_only
from selcon_plugin.cli.main import main
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.config import complete_config
from selcon_plugin.fastreid_ext.inference import load_network
from selcon_plugin.fastreid_ext.plain import measure

pytestmark = pytest.mark.slow

BAGTRICKS: dict[str, Any] = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.DEPTH": "50x",
    "MODEL.BACKBONE.FEAT_DIM": 2048,
    "MODEL.HEADS.WITH_BNNECK": True,
    "SOLVER.OPT": "Adam",
    "SOLVER.BASE_LR": 0.00035,
    "SOLVER.SCHED": "MultiStepLR",
    "SOLVER.STEPS": [1],
    "SOLVER.WARMUP_ITERS": 2,
    "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
}
AGW = BAGTRICKS | {
    "MODEL.BACKBONE.WITH_NL": True,
    "MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPooling",
}
SBS = BAGTRICKS | {
    "MODEL.FREEZE_LAYERS": ["backbone"],
    "MODEL.BACKBONE.WITH_NL": True,
    "MODEL.HEADS.NECK_FEAT": "after",
    "MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPoolingP",
    "INPUT.AUTOAUG.ENABLED": True,
    "INPUT.AUTOAUG.PROB": 0.1,
    "SOLVER.SCHED": "CosineAnnealingLR",
    "SOLVER.DELAY_EPOCHS": 1,
    "SOLVER.FREEZE_ITERS": 3,
}
IBN = {"MODEL.BACKBONE.WITH_IBN": True}
# So deep a network of random weights gives all images one feature, and equal distances rank
# in any order: with statistics of the images themselves its features differ.
R101 = IBN | {
    "MODEL.BACKBONE.DEPTH": "101x",
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 4,
}
S50 = {"MODEL.BACKBONE.NAME": "build_resnest_backbone"}
NETWORKS = {"R50": {}, "R50-ibn": IBN, "R101-ibn": R101, "S50": S50}
KINDS = {"bagtricks": BAGTRICKS, "AGW": AGW, "sbs": SBS}
CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"{kind}_{name}": base | change
        for kind, base in KINDS.items()
        for name, change in {
            "R50": {},
            "R50-ibn": IBN,
            "R101-ibn": R101,
            "S50": S50,
        }.items()
    },
    "mgn_R50-ibn": SBS
    | IBN
    | {
        "MODEL.BACKBONE.WITH_NL": False,
        "MODEL.HEADS.EMBEDDING_DIM": 256,
        "MODEL.FREEZE_LAYERS": ["backbone", "b1", "b2", "b3"],
    },
    "bagtricks_vit": BAGTRICKS
    | {
        "MODEL.BACKBONE.NAME": "build_vit_backbone",
        "MODEL.BACKBONE.DEPTH": "small",
        "MODEL.BACKBONE.FEAT_DIM": 768,
        "MODEL.HEADS.POOL_LAYER": "Identity",
        "MODEL.PIXEL_MEAN": [127.5] * 3,
        "MODEL.PIXEL_STD": [127.5] * 3,
        "SOLVER.OPT": "SGD",
        "SOLVER.BASE_LR": 0.008,
        "SOLVER.SCHED": "CosineAnnealingLR",
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    },
    "VeRi/sbs_R50-ibn": SBS
    | IBN
    | {
        "SOLVER.OPT": "SGD",
        "SOLVER.BASE_LR": 0.01,
        "DATALOADER.SAMPLER_TRAIN": "BalancedIdentitySampler",
    },
    "VehicleID/bagtricks_R50-ibn": BAGTRICKS
    | IBN
    | {"MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPooling"},
}
# Methods with clusters would find none after two epochs from random weights.
TINY = {
    "MODEL.META_ARCHITECTURE": "SelCon",
    "MODEL.BACKBONE.PRETRAIN": False,
    "MODEL.SELCON.NUM_PARTS": 0,
    "SOLVER.MAX_EPOCH": 2,
    "SOLVER.IMS_PER_BATCH": 4,
    "MODEL.SELCON.ITERS_PER_EPOCH": 2,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": 0,
}


def config(tiny_cfg: CfgNode, name: str, folder: Path) -> CfgNode:
    cfg = tiny_cfg.clone()
    for key, value in {**CONFIGS[name], **TINY, "OUTPUT_DIR": str(folder)}.items():
        cfg.merge_from_list([key, value])
    return complete_config(cfg)


def test_there_are_sixteen() -> None:
    assert len(CONFIGS) == 16


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_trains_resumes_and_leaves(
    name: str, tiny_cfg: CfgNode, synthetic_persons: Path, tmp_path: Path
) -> None:
    unbroken = config(tiny_cfg, name, tmp_path / "unbroken")
    SelConTrainer(unbroken, show_progress=False).train()
    weights = tmp_path / "unbroken" / "model_final.pth"
    expected = torch.load(weights, weights_only=True)["model"]

    broken = config(tiny_cfg, name, tmp_path / "broken")
    trainer = SelConTrainer(broken, show_progress=False)
    save = trainer.checkpointer.save

    def save_and_die(file: str, **values: Any) -> None:
        save(file, **values)
        if file == "model_0000":
            raise KeyboardInterrupt

    trainer.checkpointer.save = save_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = SelConTrainer(broken, show_progress=False)
    resumed.resume_or_load(resume=True)
    resumed.train()
    found = torch.load(tmp_path / "broken" / "model_final.pth", weights_only=True)["model"]
    assert [k for k, tensor in expected.items() if not torch.equal(found[k], tensor)] == []

    (tmp_path / "unbroken" / "config.yaml").write_text(unbroken.dump())
    folder = tmp_path / "plain"
    assert main(["export", "--weights", str(weights), "--fastreid", str(folder)]) == 0
    network = load_network(unbroken, weights, torch.device("cpu"))
    (metrics,) = measure(unbroken, network).values()
    market = as_market(synthetic_persons, tmp_path / "market")
    by_host = map_by_host_only("fastreid", folder, market)
    assert by_host == pytest.approx(metrics["mAP"], abs=1e-4)  # in percent
