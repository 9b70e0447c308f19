"""A run that is stopped, or finds a broken checkpoint, ends as the unbroken one."""

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from fastreid.engine.train_loop import HookBase
from fastreid.utils import comm

from helpers.checkpoints import assert_equal
from helpers.ddp import spawn_from_server
from selcon_plugin.config.loading import Merger
from selcon_plugin.engine.stopping import RunStopped
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext import launch as launching
from selcon_plugin.fastreid_ext.config import KEYS
from selcon_plugin.fastreid_ext.embedding import unwrap
from selcon_plugin.fastreid_ext.launch import launch
from selcon_plugin.runs.checkpoints import BadCheckpointError
from selcon_plugin.runs.folder import RunExistsError

STEPS = 3  # of an epoch
CLUSTERED = {
    "METHOD": "SelConCluster",
    "NUM_NEIGHBORS": None,
    "NUM_NEGATIVES": None,
    "WARMUP_EPOCHS": None,
    "OUTLIER_RATIO": 0.5,
    "EMA_DECAY": 0.9,
    "CLUSTERING.EPS": 0.7,
    "CLUSTERING.MIN_SAMPLES": 2,
    "CLUSTERING.K1": 8,
    "CLUSTERING.K2": 3,
    "CLUSTERING.PERIOD": 2,
}


class SignalAt(HookBase):
    """Sends this process a signal in its n-th step, or before the first for -1."""

    def __init__(self, step, number=signal.SIGTERM):
        self._step, self._number = step, number

    def before_train(self):
        if self._step < 0:
            os.kill(os.getpid(), self._number)

    def before_step(self):
        if self.trainer.iter == self._step:
            os.kill(os.getpid(), self._number)


@pytest.fixture(autouse=True)
def _signals_as_from_a_terminal():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def cfg(tiny_cfg):
    node = tiny_cfg.MODEL.SELCON
    values = {f"MODEL.SELCON.{key}": value for key, value in CLUSTERED.items()}
    Merger(tiny_cfg, KEYS).merge_overrides(values)
    node.ITERS_PER_EPOCH = STEPS
    tiny_cfg.DATALOADER.NUM_INSTANCE = 2
    tiny_cfg.DATASETS.TESTS = ()
    tiny_cfg.SOLVER.MAX_EPOCH = 3
    tiny_cfg.SOLVER.OPT = "Adam"
    tiny_cfg.SOLVER.BASE_LR = 0.001
    tiny_cfg.SOLVER.WARMUP_ITERS = 4
    return tiny_cfg


def train(cfg, folder, *hooks, resume=True):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    trainer = SelConTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer


def checkpoint(folder, name="model_final.pth"):
    return torch.load(Path(folder) / name, weights_only=True)


@pytest.fixture(scope="module")
def kept():
    """The unbroken run's checkpoint: trained once."""
    return {}


@pytest.fixture
def unbroken(cfg, tmp_path, kept):
    if not kept:
        train(cfg, tmp_path / "unbroken")
        kept.update(checkpoint(tmp_path / "unbroken"))
    return kept


# In the middle of an epoch, twice; after its last step; before all; the run's last step.
@pytest.mark.parametrize("steps", [(1, 4), (2,), (-1,), (8,)])
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_run_resumes_to_the_end_of_an_uninterrupted_one(
    cfg, tmp_path, unbroken, steps, workers
):
    cfg.DATALOADER.NUM_WORKERS = workers
    folder = tmp_path / "stopped"
    for step in steps:
        with pytest.raises(RunStopped) as stop:
            train(cfg, folder, SignalAt(step))
        assert stop.value.code == 143
        assert (folder / "last_checkpoint").read_text() == "model_stopped.pth"
        done = checkpoint(folder, "model_stopped.pth")
        assert (done["epoch"] + 1) * STEPS + done["steps_done"] == step + 1
    trainer = train(cfg, folder)
    assert trainer.start_iter == steps[-1] + 1
    assert_equal(unbroken, checkpoint(folder))
    assert not (folder / "model_stopped.pth").exists()


def test_stop_reports_how_to_resume_and_ends_the_evaluation(cfg, tmp_path, caplog):
    cfg.DATASETS.TESTS = ("SyntheticPersons",)
    cfg.TEST.EVAL_PERIOD = 0  # only at the end, where FastReID's hook would run it
    with caplog.at_level(logging.INFO), pytest.raises(RunStopped) as stop:
        train(cfg, tmp_path, SignalAt(7, signal.SIGINT))
    assert stop.value.code == 130
    assert "Stopped by SIGINT, after 2 of 3 steps of epoch 3" in caplog.text
    assert "--resume" in caplog.text
    assert "mAP" not in caplog.text
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert f'"iteration": {7}' in lines[-1]  # nothing that was measured is lost


@pytest.mark.parametrize("tag", [None, "", "model_0007.pth"])
def test_last_checkpoint_is_found_without_its_note(cfg, tmp_path, unbroken, tag):
    _cut_short(cfg, tmp_path)
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_text(tag)
    assert train(cfg, tmp_path).start_epoch == 2
    assert_equal(unbroken, checkpoint(tmp_path))


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_broken_last_checkpoint_gives_way(cfg, tmp_path, unbroken, content, caplog):
    _cut_short(cfg, tmp_path)
    file = tmp_path / "model_0001.pth"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    (tmp_path / "model_0002.pth.partial").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert train(cfg, tmp_path).start_epoch == 1
    assert "model_0001.pth" in caplog.text
    assert "Resuming from" in caplog.text
    assert_equal(unbroken, checkpoint(tmp_path))
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_readable_is_an_error_and_no_new_beginning(cfg, tmp_path):
    _cut_short(cfg, tmp_path)
    for file in tmp_path.glob("model_*.pth"):
        file.write_bytes(b"")
    with pytest.raises(BadCheckpointError, match=r"model_0001\.pth is empty.*start over"):
        train(cfg, tmp_path)


def _cut_short(cfg, folder):
    """Leave what a run leaves that is killed in its last epoch."""
    with pytest.raises(RunStopped):
        train(cfg, folder, SignalAt(6))
    (folder / "model_stopped.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0001.pth")


def test_foreign_weights_are_refused_by_name(cfg, tmp_path):
    file = tmp_path / "notes.pth"
    file.write_text("these are no weights")
    cfg.MODEL.WEIGHTS = str(file)
    with pytest.raises(BadCheckpointError, match=r"notes\.pth cannot be read"):
        train(cfg, tmp_path / "out")


def test_best_model_of_an_earlier_part_is_remembered(cfg, tmp_path):
    cfg.DATASETS.TESTS = ("SyntheticPersons",)
    cfg.TEST.EVAL_PERIOD = 1
    with pytest.raises(RunStopped):
        train(cfg, tmp_path, SignalAt(4))
    best = checkpoint(tmp_path, "model_stopped.pth")["best"]["metric"]
    assert best > 0
    cfg.OUTPUT_DIR = str(tmp_path)
    resumed = SelConTrainer(cfg)
    resumed.resume_or_load(True)
    assert resumed.checkpointer.checkpointables["best"].best_metric == best


def test_what_a_longer_run_left_is_not_taken_for_the_newest(cfg, tmp_path):
    (tmp_path / "model_0050.pth").write_text("earlier")
    with pytest.raises(RunExistsError, match=r"model_0050\.pth"):
        train(cfg, tmp_path, resume=False)
    assert [file.name for file in tmp_path.glob("*.pth")] == ["model_0050.pth"]


def _train_and_signal_the_second(cfg, folder, step):
    torch.set_num_threads(1)
    hooks = [SignalAt(step)] if comm.get_rank() == 1 and step >= 0 else []
    trainer = train(cfg, folder, *hooks)
    torch.save(unwrap(trainer.model).state_dict(), f"{folder}/rank{comm.get_rank()}.pt")


def test_signal_to_one_of_two_processes_stops_both(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "spawn", spawn_from_server)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch(_train_and_signal_the_second, 2, args=(cfg, str(whole), -1))
    with pytest.raises(SystemExit) as stop:
        launch(_train_and_signal_the_second, 2, args=(cfg, str(broken), 3))
    assert stop.value.code == 143
    assert checkpoint(broken, "model_stopped.pth")["steps_done"] == 2  # one step later
    launch(_train_and_signal_the_second, 2, args=(cfg, str(broken), -1))
    for file in ("rank0.pt", "rank1.pt"):
        assert_equal(checkpoint(whole, file), checkpoint(broken, file))
