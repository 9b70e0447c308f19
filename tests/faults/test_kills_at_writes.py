"""A kill between any two writes of a run loses nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tiny
from helpers.checkpoints import assert_equal
from helpers.hosts import needs_fastreid, needs_torchreid
from helpers.programs import environment, run_program
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.runs.metrics import read_metrics

PROGRAM = Path(__file__).parents[1] / "helpers" / "killed_at_write.py"
EPOCHS = 3
# In a set this small no cluster is a sign of a collapse, and the best weights are kept.
SPEC = replace(tiny.SPEC, num_train_ids=6)
_CLUSTERING = {"eps": 0.55, "min_samples": 2, "k1": 4, "k2": 2}
# The same run in both hosts. Its best weights are those of epoch 1, then of 2, or later.
_RUN: dict[str, Any] = {
    "method": "SelConCluster",
    "keep_best_by": "silhouette",
    "keep_checkpoints": 1,
    "iters_per_epoch": 2,
    "report_images": True,
    **{f"clustering.{key}": value for key, value in _CLUSTERING.items()},
}
# Period of the checkpoints by the epochs that are evaluated.
_SHAPES = {"each epoch": 1, "the last epoch": 2}
HOSTS = [
    pytest.param("fastreid", marks=needs_fastreid),
    pytest.param("torchreid", marks=needs_torchreid),
]
# Parts of the names of metrics that are measured in each run.
_TIMES = ("time", "seconds", "eta", "memory")


def arguments(host: str, shape: str, root: Path, folder: Path) -> list[str]:
    """Return the arguments of ``selcon`` that begin the run, or resume it."""
    evaluated = 1 if shape == "each epoch" else EPOCHS
    if host == "fastreid":
        options = tiny.FASTREID | {f"MODEL.SELCON.{k.upper()}": v for k, v in _RUN.items()}
        options |= {
            "DATASETS.SYNTHETIC_PERSONS.NUM_TRAIN_IDS": SPEC.num_train_ids,
            "SOLVER.MAX_EPOCH": EPOCHS,
            "SOLVER.CHECKPOINT_PERIOD": _SHAPES[shape],
            "SOLVER.WARMUP_ITERS": 0,
            "SOLVER.BASE_LR": 0.01,
            "TEST.EVAL_PERIOD": evaluated,
            "OUTPUT_DIR": folder,
        }
    else:
        options = tiny.TORCHREID | {f"selcon.{key}": value for key, value in _RUN.items()}
        options |= {
            "synthetic_persons.num_train_ids": SPEC.num_train_ids,
            "train.max_epoch": EPOCHS,
            "train.lr": 0.01,
            "selcon.checkpoint_period": _SHAPES[shape],
            "test.eval_freq": evaluated,
            "data.root": root,
            "data.save_dir": folder,
        }
    pairs = [str(part) for pair in options.items() for part in pair]
    return ["train", "--host", host, "--resume", *pairs]


def train(host: str, shape: str, root: Path, folder: Path, kill_at: str = "") -> list[str]:
    """Train in a process, and return the names of the files that it wrote.

    It must end by itself, or be killed if a write is given.
    """
    log = folder.with_suffix(".writes")
    log.write_text("")
    done = run_program(
        PROGRAM,
        *arguments(host, shape, root, folder),
        env=environment(
            RUN_FOLDER=folder, WRITES=log, KILL_AT=kill_at, FASTREID_DATASETS=root
        ),
    )
    assert done.returncode == (-9 if kill_at else 0), (kill_at, done.stdout, done.stderr)
    return log.read_text().splitlines()


def files_of(folder: Path) -> set[str]:
    """Return the files of a finished run.

    Each process begins a file of TensorBoard. A run that has no checkpoint yet begins again
    and moves its own files aside.
    """
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return {n for n in names if "tfevents" not in n and not n.startswith("old-")}


def metrics_of(folder: Path) -> list[dict[str, float | None]]:
    """Return the metrics by step, without times.

    FastReID's losses are medians over the last steps of a process, which are not repeated.
    """
    is_fastreid = (folder / "last_checkpoint").exists()
    return [
        {
            name: None if is_fastreid and "loss" in name else value
            for name, value in line.items()
            if not any(word in name for word in _TIMES)
        }
        for line in read_metrics(folder / "metrics.json")
    ]


def results_of(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "results.json").read_text())
    return {key: record[key] for key in ("metrics", "num_clusters", "steps", "epochs")}


def assert_same_run(whole: Path, broken: Path, kill_at: str) -> None:
    """Check that a resumed run ended as the uninterrupted one."""
    names = files_of(whole)
    assert files_of(broken) == names, kill_at
    for name in names:
        if ".pth" in name:
            ends = [torch.load(run / name, weights_only=True) for run in (whole, broken)]
            assert_equal(*ends, f"{kill_at}: {name}")
    assert results_of(broken) == results_of(whole), kill_at
    assert metrics_of(broken) == metrics_of(whole), kill_at
    for name in ("images.json", "ranked.json"):
        first, second = (json.loads((run / name).read_text()) for run in (whole, broken))
        assert first == second, (kill_at, name)
    features = [np.load(run / "embedding.npz") for run in (whole, broken)]
    assert features[0].files == features[1].files
    for name in features[0].files:
        np.testing.assert_array_equal(features[0][name], features[1][name], kill_at)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(folder, SPEC)
    return folder


def assert_nothing_is_lost(case: tuple[str, str, Path], whole: Path, kill_at: str) -> None:
    """Kill a run at a write, resume it, and compare it with the uninterrupted one."""
    broken = whole.with_name(kill_at.replace(" ", ""))
    train(*case, broken, kill_at)
    train(*case, broken)
    assert_same_run(whole, broken, kill_at)
    shutil.rmtree(broken)


@pytest.mark.parametrize("host", HOSTS)
def test_a_kill_after_a_network_is_written(host: str, root: Path, tmp_path: Path) -> None:
    """The first one, then the last best weights and the checkpoints around them."""
    case, whole = (host, "each epoch", root), tmp_path / "whole"
    networks = [
        (number, name)
        for number, name in enumerate(train(*case, whole), start=1)
        if ".pth" in name
    ]
    best = [i for i, (_, name) in enumerate(networks) if "best_without_labels" in name]
    assert len(best) > 1  # written again, when there was a checkpoint
    for number, _ in (networks[0], *networks[best[-1] :]):
        assert_nothing_is_lost(case, whole, f"after {number}")


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("shape", _SHAPES)
def test_a_kill_at_any_write(host: str, shape: str, root: Path, tmp_path: Path) -> None:
    case, whole = (host, shape, root), tmp_path / "whole"
    for number in range(1, len(train(*case, whole)) + 1):
        for order in ("before", "after"):
            assert_nothing_is_lost(case, whole, f"{order} {number}")
