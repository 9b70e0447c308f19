"""Weights are on disk before anything is evaluated; a resumed run catches up on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fastreid.config import CfgNode
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.checkpoints import assert_equal
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.embedding import unwrap


class FailingTrainer(SelConTrainer):
    """Trainer whose evaluations fail as if they ran out of memory."""

    failing = True

    @classmethod
    def test(cls, cfg, model):
        if cls.failing:
            raise MemoryError("evaluation")
        return super().test(cfg, model)


def run(cfg: CfgNode, kind: type[SelConTrainer], *, resume: bool = False) -> SelConTrainer:
    trainer = kind(cfg, show_progress=False)
    trainer.resume_or_load(resume)
    trainer.results = trainer.train()
    return trainer


def entries(folder: Path, name: str) -> dict:
    return torch.load(folder / name, weights_only=True)


def scalars_of(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each scalar in TensorBoard's files."""
    found = EventAccumulator(str(folder)).Reload()
    return {
        name: [event.step for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def test_metrics_and_tensorboard_hold_each_evaluation_once(tiny_cfg: CfgNode) -> None:
    """The last one too, and that of an epoch at whose last step all is written anyway."""
    tiny_cfg.TEST.EVAL_PERIOD = 1
    tiny_cfg.MODEL.SELCON.ITERS_PER_EPOCH = 3
    trainer = run(tiny_cfg, SelConTrainer)
    folder = Path(tiny_cfg.OUTPUT_DIR)
    lines = [json.loads(line) for line in (folder / "metrics.json").open()]
    steps = [line["iteration"] for line in lines if "mAP" in line]
    assert steps == [2, 5]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [2, 5]
    assert lines[-1]["mAP"] == pytest.approx(trainer.results["mAP"])
    written = scalars_of(folder)
    assert written["mAP"] == written["total_loss"] == [2, 5]


@pytest.mark.parametrize("period", [2, 0, 1, 5])
def test_failing_evaluation_loses_nothing(
    tiny_cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, period: int
) -> None:
    tiny_cfg.TEST.EVAL_PERIOD = period
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 5
    unbroken = run(tiny_cfg, SelConTrainer)
    folder = tmp_path / "failing"
    cfg = tiny_cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    with pytest.raises(MemoryError):
        run(cfg, FailingTrainer)
    saved = "model_stopped.pth" if period == 1 else "model_final.pth"
    assert (folder / "last_checkpoint").read_text() == saved
    weights = entries(folder, saved)["model"]
    if period != 1:  # the last epoch, with its final weights
        assert_equal(weights, dict(unwrap(unbroken.model).state_dict()))
    monkeypatch.setattr(FailingTrainer, "failing", False)
    resumed = run(cfg, FailingTrainer, resume=True)
    assert resumed.results == unbroken.results
    for name in ("model_best.pth", "model_final.pth"):
        twin = Path(tiny_cfg.OUTPUT_DIR, name)
        assert twin.exists() == (folder / name).exists(), name
        if twin.exists():
            found, expected = entries(folder, name), entries(twin.parent, name)
            assert found["metric"] == expected["metric"], name
            assert_equal(found["model"], expected["model"])
    assert not (folder / "model_stopped.pth").exists()
