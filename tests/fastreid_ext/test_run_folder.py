"""A run in FastReID: nothing of another run is mixed in, lost, or taken for its own."""

import os
import random
import shutil

import pytest
import torch

from helpers.checkpoints import assert_equal
from selcon_plugin.cli import main
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.checkpoint import SelConCheckpointer
from selcon_plugin.io.atomic import save_atomically
from selcon_plugin.runs.folder import RunExistsError
from selcon_plugin.runs.metrics import read_metrics


def build(cfg, *, resume=False, overwrite=False, **changes):
    cfg = cfg.clone()
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    trainer = SelConTrainer(cfg, show_progress=False, overwrite=overwrite)
    trainer.resume_or_load(resume)
    return trainer


def train(cfg, **options):
    trainer = build(cfg, **options)
    trainer.train()
    return trainer


@pytest.fixture
def folder(tiny_cfg, tmp_path):
    """Folder of a run of two epochs, with checkpoints and an evaluation of each."""
    tiny_cfg.TEST.EVAL_PERIOD = 1
    tiny_cfg.MODEL.SELCON.ITERS_PER_EPOCH = 2
    train(tiny_cfg)
    return tmp_path / "out"


def content(folder):
    return {f: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_refused_run_changes_nothing_and_a_new_one_shares_nothing(
    tiny_cfg, folder, tmp_path, capsys, monkeypatch
):
    before = content(folder)
    with pytest.raises(RunExistsError, match=r"--resume.*--overwrite"):
        train(tiny_cfg, MODEL__SELCON__SEED=1)
    for more in (
        ["--images", str(tmp_path / "nowhere")],
        ["--images", str(tmp_path / "nowhere"), "--overwrite"],
        ["--overwrite", "--resume"],
    ):
        assert main(["train", *more, "OUTPUT_DIR", str(folder)]) == 2
    with pytest.raises(ValueError, match="IMS_PER_BATCH"):
        train(tiny_cfg, overwrite=True, SOLVER__IMS_PER_BATCH=400)
    assert content(folder) == before

    # A new run that is killed before its first checkpoint does not resume as the old one.
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SelConCheckpointer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_cfg, overwrite=True, MODEL__SELCON__TEMPERATURE=0.5)
    again = build(tiny_cfg, resume=True, MODEL__SELCON__TEMPERATURE=0.5)
    assert again.start_epoch == 0
    again.train()
    separate = train(
        tiny_cfg, MODEL__SELCON__TEMPERATURE=0.5, OUTPUT_DIR=str(tmp_path / "separate")
    )
    assert_equal(again.model.state_dict(), separate.model.state_dict())
    mine, others = (
        read_metrics(place / "metrics.json") for place in (folder, tmp_path / "separate")
    )
    assert [m.get("total_loss") for m in mine] == [m.get("total_loss") for m in others]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.BASE_LR", 0.5),
        ("MODEL.SELCON.TEMPERATURE", 0.5),
        ("INPUT.REA.ENABLED", False),
        ("MODEL.SELCON.NUM_PARTS", 4),
    ],
)
def test_resuming_names_each_setting_that_changed(tiny_cfg, folder, key, value):
    before = content(folder)
    with pytest.raises(ValueError, match=rf"cannot resume: {key} was .* and is {value}"):
        build(tiny_cfg, resume=True, **{key.replace(".", "__"): value})
    assert content(folder) == before
    free = {"TEST__IMS_PER_BATCH": 4, "MODEL__SELCON__KEEP_CHECKPOINTS": 1}
    assert build(tiny_cfg, resume=True, SOLVER__MAX_EPOCH=5, **free).start_epoch == 2


def test_flipped_bit_in_the_last_checkpoint_falls_back_with_a_line(
    tiny_cfg, folder, caplog
):
    last = folder / "model_final.pth"
    whole, chosen = last.read_bytes(), random.Random(3)
    expected = torch.load(last, weights_only=True)
    caplog.set_level("WARNING")
    noticed = 0
    for _ in range(12):
        damaged = bytearray(whole)
        damaged[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        last.write_bytes(damaged)
        caplog.clear()
        trainer = build(tiny_cfg, resume=True, SOLVER__MAX_EPOCH=3)
        fell_back = trainer.start_epoch == 1 or "instead" in caplog.text
        if fell_back:
            noticed += 1
            assert f"{last}" in caplog.text
        else:  # a bit between the records
            assert_equal(trainer.model.state_dict(), expected["model"])
    assert noticed > 6


def test_run_without_a_checkpoint_resumes_from_its_start(tiny_cfg, tmp_path):
    best = tmp_path / "out" / "best_without_labels.pth"
    best.parent.mkdir()
    best.write_text("of a run that was killed before its first checkpoint")
    with pytest.raises(RunExistsError, match=rf"holds a run .{best.name}"):
        train(tiny_cfg)
    assert train(tiny_cfg, resume=True).start_epoch == 0
    assert not best.exists()
    assert list(best.parent.glob(f"old-*/{best.name}"))


@pytest.mark.parametrize("damage", ["cut", "gone", "of an epoch less"])
def test_last_checkpoint_of_a_complete_run_is_restored_from_the_best(
    tiny_cfg, folder, damage
):
    """The best model is a whole checkpoint, here that of the last epoch."""
    last = folder / "model_final.pth"
    expected = torch.load(last, weights_only=True)
    best = torch.load(folder / "model_best.pth", weights_only=True)
    if best["epoch"] < 1:
        save_atomically(expected, folder / "model_best.pth")
    if damage == "cut":
        os.truncate(last, last.stat().st_size // 2)
    elif damage == "gone":
        last.unlink()
    else:  # of the shorter training that this run extends
        shutil.copy(folder / "model_0000.pth", last)
        (folder / "run.json").unlink()
        (folder / "last_checkpoint").write_text("model_best.pth")
    trainer = train(tiny_cfg, resume=True)
    assert trainer.start_epoch == 2
    assert_equal(torch.load(last, weights_only=True), expected)
    assert trainer.checkpointer.folder.last == "model_final.pth"


def test_best_model_survives_a_kill_next_to_its_checkpoint(tiny_cfg, tmp_path, monkeypatch):
    tiny_cfg.TEST.EVAL_PERIOD = 1
    tiny_cfg.MODEL.SELCON.ITERS_PER_EPOCH = 1
    tiny_cfg.SOLVER.MAX_EPOCH = 3
    scores = iter([50.0, 90.0, 60.0] * 2)
    monkeypatch.setattr(
        SelConTrainer,
        "test",
        classmethod(lambda cls, cfg, model: {"metric": next(scores)}),
    )
    real = SelConCheckpointer.save
    saved = []

    def save(self, name, **kwargs):
        real(self, name, **kwargs)
        saved.append(name)
        if saved.count("model_best") == 2 and name == "model_best":
            raise KeyboardInterrupt  # between the best model and its epoch's checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(SelConCheckpointer, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_cfg)
    out = tmp_path / "out"
    best = torch.load(out / "model_best.pth", weights_only=True)
    assert best["metric"] == 90.0
    # What is repeated may be worse on another machine: the best model stays.
    scores = iter([80.0, 60.0, 60.0])
    train(tiny_cfg, resume=True)
    assert torch.load(out / "model_best.pth", weights_only=True)["metric"] == 90.0
    final = torch.load(out / "model_final.pth", weights_only=True)
    assert final["best"]["metric"] == 90.0
