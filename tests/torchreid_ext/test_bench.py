"""``selcon bench`` on configs of both hosts: one table."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import warnings
from pathlib import Path

import pytest
import yaml

from helpers import programs
from selcon_plugin.cli.bench import main
from selcon_plugin.hosts import get_host
from selcon_plugin.workflows.bench_runs import progress

pytest.importorskip("fastreid")

SPEC = {"num_train_ids": 8, "num_test_ids": 4, "images_per_id": 5, "num_cameras": 3}
SPEC["num_distractors"] = 3
METHOD = {"num_parts": 2, "num_neighbors": 3, "num_negatives": 20, "warmup_epochs": 0}


def upper(values: dict[str, object]) -> dict[str, object]:
    return {key.upper(): value for key, value in values.items()}


def run_bench(*arguments: object) -> tuple[int, str]:
    output = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(output),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(subprocess, "Popen", programs.popen)
        warnings.simplefilter("default")  # pytest makes errors of what the hosts warn of
        status = main([str(argument) for argument in arguments])
    return status, output.getvalue()


@pytest.fixture
def configs(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same tiny run in both hosts."""
    monkeypatch.setenv("FASTREID_DATASETS", str(data_root))
    fastreid = {
        "MODEL": {
            "META_ARCHITECTURE": "SelCon",
            "BACKBONE": {
                "NAME": "build_torchreid_backbone",
                "TORCHREID_NAME": "osnet_x0_25",
                "PRETRAIN": False,
            },
            "SELCON": upper(METHOD),
        },
        "INPUT": {"SIZE_TRAIN": [64, 32], "SIZE_TEST": [64, 32]},
        "DATASETS": {
            "NAMES": ["SyntheticPersons"],
            "TESTS": ["SyntheticPersons"],
            "SYNTHETIC_PERSONS": upper(SPEC),
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"IMS_PER_BATCH": 8, "WARMUP_ITERS": 0},
    }
    torchreid = {
        "model": {"name": "osnet_x0_25", "pretrained": False},
        "data": {
            "root": str(data_root),
            "sources": ["syntheticpersons"],
            "targets": ["syntheticpersons"],
            "height": 64,
            "width": 32,
            "workers": 0,
        },
        "train": {"batch_size": 8},
        "selcon": METHOD,
        "synthetic_persons": SPEC,
    }
    files = []
    for name, content in (("in_fastreid", fastreid), ("in_torchreid", torchreid)):
        files.append(tmp_path / f"{name}.yml")
        files[-1].write_text(yaml.safe_dump(content))
    return files


def test_both_hosts_share_one_table(configs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--configs", *configs, "--seeds", 1, "--epochs", 1, "--output", output]
    status, text = run_bench(*arguments, "SOLVER.BASE_LR", "0.01", "train.lr", "0.01")
    assert status == 0, text
    table = (output / "table.md").read_text()
    for name, host in (("in_fastreid", "fastreid"), ("in_torchreid", "torchreid")):
        record = json.loads((output / name / "seed0" / "results.json").read_text())
        assert record["host"] == host
        assert record["steps"] == 5
        (metrics,) = record["metrics"].values()
        assert f"| {metrics['mAP']:.1f} |" in table
    content = json.loads((output / "table.json").read_text())
    differing = content["differences"]
    assert differing["host"] == {"in_fastreid": "fastreid", "in_torchreid": "torchreid"}
    # What is the same in both, under another key, does not differ.
    for key in ("SOLVER.MAX_EPOCH", "SOLVER.IMS_PER_BATCH", "INPUT.SIZE_TRAIN"):
        assert key not in differing
    assert not any(key.startswith("MODEL.SELCON.NUM") for key in differing)
    again, text = run_bench(*arguments, "SOLVER.BASE_LR", "0.01", "train.lr", "0.01")
    assert again == 0
    assert text.count("finished earlier") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.save_dir", "x"], "data.save_dir is set by --output"),
        (["selcon.seed", "3"], "selcon.seed is set by --output and --seeds"),
        (["--dataset", "nowhere"], "unknown data set 'nowhere'; known are .*market1501"),
        (["SOLVER.BASE_LR", "0.1"], "SOLVER.BASE_LR is a key of another host"),
    ],
)
def test_mistakes_end_before_training(
    configs: list[Path], tmp_path: Path, arguments: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run_bench("--output", tmp_path / "out", "--configs", configs[1], *arguments)


def test_progress_is_read_from_what_torchreid_prints() -> None:
    log = "=> Start training\nepoch: [3/20][10/31]\ttime 0.5 (0.5)\teta 0:04:05\tloss 1 (1)"
    assert (
        progress(log, 20, 75.0, get_host("torchreid").run_files)
        == "epoch 3/20, 1 min 15 s, 4 min 5 s left"
    )
