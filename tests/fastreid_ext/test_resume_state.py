"""The state that FastReID hides is in each checkpoint: k steps and k more are 2k steps."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fastreid.config import CfgNode
from fastreid.engine.train_loop import HookBase

from helpers.checkpoints import assert_equal
from helpers.trainers import trained
from selcon_plugin.engine.stopping import RunStopped
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.embedding import unwrap
from selcon_plugin.fastreid_ext.freezing import unmatched_layers

STEPS = 5  # of an epoch
CLUSTERS = {
    "MODEL.SELCON.METHOD": "SelConCluster",
    "MODEL.SELCON.CLUSTERING.EPS": 0.7,
    "MODEL.SELCON.CLUSTERING.MIN_SAMPLES": 2,
    "MODEL.SELCON.CLUSTERING.K1": 8,
    "MODEL.SELCON.CLUSTERING.K2": 3,
}
FREEZE = {"MODEL.FREEZE_LAYERS": ["backbone"], "SOLVER.FREEZE_ITERS": 8}
FEATURES: dict[str, dict[str, Any]] = {
    "freeze, clusters, evaluations, cosine, delay": {
        **FREEZE,
        **CLUSTERS,
        "TEST.EVAL_PERIOD": 1,
        "SOLVER.SCHED": "CosineAnnealingLR",
        "SOLVER.DELAY_EPOCHS": 1,
    },
    "freeze, Adam, clipping, cosine, warm-up of more than an epoch": {
        **FREEZE,
        "SOLVER.OPT": "Adam",
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.SCHED": "CosineAnnealingLR",
        "SOLVER.WARMUP_ITERS": 7,
    },
    "steps, exponential warm-up, nesterov, rates by layer": {
        "SOLVER.STEPS": [1, 3],
        "SOLVER.WARMUP_ITERS": 3,
        "SOLVER.WARMUP_METHOD": "exp",
        "SOLVER.NESTEROV": True,
        "SOLVER.HEADS_LR_FACTOR": 10.0,
        "SOLVER.BIAS_LR_FACTOR": 2.0,
    },
    "random patches": {"INPUT.RPT.ENABLED": True, "INPUT.RPT.PROB": 1.0},
    "teacher, bfloat16, freeze longer than the run, precise statistics": {
        **FREEZE,
        "SOLVER.FREEZE_ITERS": 1000,
        "MODEL.SELCON.EMA_DECAY": 0.9,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.AMP.DTYPE": "bfloat16",
        "TEST.PRECISE_BN.ENABLED": True,
        "TEST.PRECISE_BN.NUM_ITER": 2,
    },
}


class StopAfter(HookBase):
    """Stop the run as a signal would, after a number of steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self._steps:
            signal.raise_signal(signal.SIGTERM)


def state_of(trainer: SelConTrainer) -> dict[str, Any]:
    return {
        "model": dict(unwrap(trainer.model).state_dict()),
        "optimizer": trainer.optimizer.state_dict(),
        **{name: part.state_dict() for name, part in trainer.scheduler.items()},
    }


def configured(cfg: CfgNode, values: dict[str, Any], folder: Path) -> CfgNode:
    cfg = cfg.clone()
    for key, value in {**values, "SOLVER.MAX_EPOCH": 3, "OUTPUT_DIR": folder}.items():
        cfg.merge_from_list([key, str(value) if key == "OUTPUT_DIR" else value])
    return cfg


@pytest.mark.parametrize("name", FEATURES)
def test_k_steps_and_k_more_are_2k_steps(
    tiny_cfg: CfgNode, tmp_path: Path, name: str
) -> None:
    values = {"TEST.EVAL_PERIOD": 3, **FEATURES[name]}
    unbroken = trained(configured(tiny_cfg, values, tmp_path / "unbroken"))
    assert unbroken.iters_per_epoch == STEPS
    cfg = configured(tiny_cfg, values, tmp_path / "broken")
    # At the end of an epoch, and inside one that freezes and warms up.
    for stop in (STEPS + 1, 2 * STEPS):
        trainer = SelConTrainer(cfg, show_progress=False)
        trainer.register_hooks([StopAfter(stop)])
        trainer.resume_or_load(True)
        with pytest.raises(RunStopped):
            trainer.train()
    resumed = trained(cfg, resume=True)
    assert resumed.start_iter == 2 * STEPS
    assert_equal(state_of(unbroken), state_of(resumed))


def test_frozen_steps_of_an_old_checkpoint_are_those_of_the_run(
    tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    cfg = configured(tiny_cfg, FREEZE, tmp_path)
    trainer = SelConTrainer(cfg, show_progress=False)
    trainer.register_hooks([StopAfter(6)])
    with pytest.raises(RunStopped):
        trainer.train()
    file = tmp_path / "model_stopped.pth"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["optimizer"].pop("frozen_steps") == 6
    torch.save(checkpoint, file)
    trainer = SelConTrainer(cfg, show_progress=False)
    trainer.resume_or_load(True)
    assert trainer.optimizer.frozen_steps == 6


def test_frozen_layers_stay_in_evaluation_mode_after_a_clustering(
    tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    """Their running statistics do not move while they are frozen."""
    values = {**FREEZE, **CLUSTERS, "SOLVER.FREEZE_ITERS": 1000, "TEST.EVAL_PERIOD": 1}
    trainer = SelConTrainer(configured(tiny_cfg, values, tmp_path), show_progress=False)
    before = {k: v.clone() for k, v in unwrap(trainer.model).backbone.state_dict().items()}
    trainer.train()
    for name, value in unwrap(trainer.model).backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_unmatched_layers_are_named(tiny_cfg: CfgNode) -> None:
    trainer = SelConTrainer(tiny_cfg, show_progress=False)
    layers = ["backbone", "b1", "heads.part", "ackbone"]
    assert unmatched_layers(unwrap(trainer.model), layers) == ["b1", "ackbone"]
