"""A run that is stopped, or finds a broken checkpoint, ends as the unbroken one."""

import logging
import os
import signal

import pytest
import torch

from helpers.checkpoints import assert_equal
from selcon_plugin.engine.stopping import RunStopped
from selcon_plugin.runs.checkpoints import BadCheckpointError

EPOCHS, STEPS = 3, 3
OPTIONS = {"method": "SelConCluster", "num_instances": 2, "ema_decay": 0.9}


@pytest.fixture
def make(make_engine, manager):
    """Make an engine that ends before the last epoch's evaluation is worth its time."""

    def engine(workers=0):
        made = make_engine(
            datamanager=manager(workers=workers), iters_per_epoch=STEPS, **OPTIONS
        )
        made.test_loader = {}
        return made

    return engine


def run(engine, folder, signal_at=None, number=signal.SIGTERM):
    try:
        engine.resume(folder)
    except FileNotFoundError:
        folder.mkdir(exist_ok=True)
    step = engine.forward_backward

    def signaled(batch):
        if engine._step == signal_at:
            os.kill(os.getpid(), number)
        return step(batch)

    engine.forward_backward = signaled
    engine.run(str(folder), EPOCHS)
    return engine


def checkpoint(folder, name=f"model.pth.tar-{EPOCHS}"):
    return torch.load(folder / "model" / name, weights_only=True)


@pytest.fixture(scope="module")
def kept():
    """The unbroken run's checkpoint: trained once."""
    return {}


@pytest.fixture
def unbroken(make, tmp_path, kept):
    if not kept:
        run(make(), tmp_path / "unbroken")
        kept.update(checkpoint(tmp_path / "unbroken"))
    return kept


@pytest.mark.parametrize("steps", [(1, 4), (2,), (8,)])
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_run_resumes_to_the_end_of_an_uninterrupted_one(
    make, tmp_path, unbroken, steps, workers
):
    folder = tmp_path / "stopped"
    for step in steps:
        with pytest.raises(RunStopped) as stop:
            run(make(workers), folder, step)
        assert stop.value.code == 143
        done = checkpoint(folder, "model-stopped.pth.tar")
        assert done["epoch"] * STEPS + done["selcon"]["steps_done"] == step + 1
    run(make(workers), folder)
    assert_equal(unbroken, checkpoint(folder))
    assert not (folder / "model" / "model-stopped.pth.tar").exists()


def test_stop_reports_how_to_resume(make, tmp_path, caplog):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with caplog.at_level(logging.INFO), pytest.raises(RunStopped) as stop:
        run(make(), tmp_path, 4, signal.SIGINT)
    assert stop.value.code == 130
    assert "Stopped by SIGINT, after 2 of 3 steps of epoch 2" in caplog.text
    assert "engine.resume(save_dir)" in caplog.text


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_broken_last_checkpoint_gives_way(make, tmp_path, unbroken, content, caplog):
    with pytest.raises(RunStopped):
        run(make(), tmp_path, 6)
    folder = tmp_path / "model"
    (folder / "model-stopped.pth.tar").unlink()
    file = folder / "model.pth.tar-2"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    (folder / "model.pth.tar-3.partial").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert make().resume(tmp_path) == 1
    assert "model.pth.tar-2" in caplog.text
    assert f"Resuming from {folder / 'model.pth.tar-1'}" in caplog.text
    run(make(), tmp_path)
    assert not list(folder.glob("*.partial"))
    assert_equal(unbroken, checkpoint(tmp_path))


def test_nothing_readable_is_an_error(make, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.pth.tar-1").write_bytes(b"")
    with pytest.raises(BadCheckpointError, match=r"model\.pth\.tar-1 is empty.*start over"):
        make().resume(tmp_path)
    with pytest.raises(BadCheckpointError, match="load_pretrained_weights"):
        make().resume(tmp_path / "model" / "model.pth.tar-1")


def test_evaluation_only_leaves_ctrl_c_to_python(make_engine, tmp_path):
    engine = make_engine()
    seen = []
    engine.test = lambda **_: seen.append(signal.getsignal(signal.SIGTERM))
    engine.run(str(tmp_path), test_only=True)
    assert seen == [signal.SIG_DFL]
