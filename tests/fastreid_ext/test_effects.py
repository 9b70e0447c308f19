"""Settings without effect are named in one line when the training starts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastreid.config import CfgNode

from selcon_plugin.fastreid_ext import SelConTrainer

UNUSED = {
    "MODEL.LOSSES.CE.SCALE": 2.0,
    "MODEL.LOSSES.TRI.MARGIN": 0.5,
    "MODEL.HEADS.CLS_LAYER": "CircleSoftmax",
    "MODEL.HEADS.SCALE": 64,
    "MODEL.HEADS.MARGIN": 0.35,
    "MODEL.HEADS.NECK_FEAT": "after",
    "MODEL.QUEUE_SIZE": 100,
    "MODEL.BACKBONE.DEPTH": "18x",  # of FastReID's own networks
    "KD.EMA.ENABLED": True,
    "DATALOADER.SET_WEIGHT": [1, 2],
    "MODEL.SELCON.CLUSTERING.EPS": 0.3,  # the method does not cluster
    "INPUT.CJ.BRIGHTNESS": 0.5,  # INPUT.CJ.ENABLED is False
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
    "SOLVER.ETA_MIN_LR": 1e-5,  # of the cosine schedule
    "SOLVER.WARMUP_METHOD": "exp",  # without a warm-up
}
USED = {
    "MODEL.HEADS.WITH_BNNECK": True,
    "MODEL.HEADS.POOL_LAYER": "GlobalMaxPool",
    "MODEL.SELCON.TEMPERATURE": 0.2,
    "MODEL.SELCON.DIAGNOSTICS_PERIOD": 1,
    "SOLVER.STEPS": [1],
    "SOLVER.MOMENTUM": 0.8,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    "SOLVER.BIAS_LR_FACTOR": 2.0,
    "SOLVER.GAMMA": 0.5,
    "INPUT.REA.PROB": 0.3,
    "TEST.FLIP.ENABLED": True,
    "TEST.METRIC": "euclidean",
    "DATALOADER.NUM_INSTANCE": 2,
}


def started(cfg: CfgNode, values: dict[str, Any], caplog: Any) -> list[str]:
    """Return the warnings at the start of a training."""
    for key, value in values.items():
        cfg.merge_from_list([key, value])
    trainer = SelConTrainer(cfg, show_progress=False)
    trainer.resume_or_load(False)
    trainer._train_epochs = lambda: None  # type: ignore[method-assign]
    trainer.after_train = lambda: None  # type: ignore[method-assign]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    return [record.getMessage() for record in caplog.records]


def test_settings_without_effect_are_named_in_one_line(
    tiny_cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = started(tiny_cfg, {**UNUSED, **USED}, caplog)
    named = line.partition(": ")[2].split(", ")
    assert sorted(named) == sorted(UNUSED)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, ""),
        ({"MODEL.FREEZE_LAYERS": ["backbone", "b1"], "SOLVER.FREEZE_ITERS": 3}, "'b1'"),
        ({"MODEL.FREEZE_LAYERS": ["backbone"]}, "MODEL.FREEZE_LAYERS"),
        ({"SOLVER.FREEZE_ITERS": 3}, "SOLVER.FREEZE_ITERS"),
        ({"SOLVER.OPT": "Adam", "SOLVER.MOMENTUM": 0.8}, "SOLVER.MOMENTUM"),
        ({"SOLVER.SCHED": "CosineAnnealingLR", "SOLVER.STEPS": [1]}, "SOLVER.STEPS"),
        ({"SOLVER.WARMUP_ITERS": 10}, "SOLVER.WARMUP_ITERS is 10, but the run has 10"),
        ({"SOLVER.DELAY_EPOCHS": 2}, "SOLVER.DELAY_EPOCHS is 2"),
        (
            {"MODEL.FREEZE_LAYERS": ["backbone"], "SOLVER.FREEZE_ITERS": 99},
            "SOLVER.FREEZE_ITERS is 99, but the run has 10 steps: backbone",
        ),
    ],
)
def test_line_names_what_has_no_effect_or_never_ends(
    tiny_cfg: CfgNode,
    caplog: pytest.LogCaptureFixture,
    values: dict[str, Any],
    named: str,
) -> None:
    lines = started(tiny_cfg, values, caplog)
    assert len(lines) == bool(named)
    assert not named or named in lines[0]


def test_cosine_without_an_epoch_of_its_own_trains(tiny_cfg: CfgNode) -> None:
    tiny_cfg.SOLVER.SCHED = "CosineAnnealingLR"
    tiny_cfg.SOLVER.WARMUP_ITERS = 7  # of 10 steps, in 2 epochs
    trainer = SelConTrainer(tiny_cfg, show_progress=False)
    assert trainer.scheduler["lr_sched"].T_max == 1
