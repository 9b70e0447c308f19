"""Runs, checkpoints, configs and indexes of version 0.1.0 still load (tests/old_runs)."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.programs import environment, run_program
from selcon_plugin.report import collect_run

OLD_RUNS = Path(__file__).parent / "old_runs"
CHECKPOINT = {"fastreid": "model_final.pth", "torchreid": "model/model.pth.tar-2"}
RENAMED = {  # in the configs of tests/old_runs
    "MAX_BAD_SHARE": "MAX_UNREADABLE_RATIO",
    "ON_BAD_NUMBERS": "ON_NONFINITE",
    "MAX_BAD_STEPS": "MAX_NONFINITE_STEPS",
}
# Other processors round otherwise: what the same weights give is equal within this.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}

# The backbone has to be registered before the command begins.
PROGRAM = """
import sys
import tiny_resnet
from selcon_plugin.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the old runs to a folder in which they may be changed."""
    copy = tmp_path / "runs"
    shutil.copytree(OLD_RUNS, copy)
    for file in [*copy.rglob("*.json"), *copy.rglob("*.jsonl")]:
        file.write_text(file.read_text().replace("@FOLDER@", str(copy)))
    return copy


def need(host: str) -> None:
    if importlib.util.find_spec(host) is None:
        pytest.skip(f"{host} is not installed")


def selcon(folder: Path, *arguments: str) -> str:
    """Run a command in the folder; return what it printed."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    env = environment(FASTREID_DATASETS="data")
    done = run_program(program, *arguments, cwd=folder, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def weights_in(file: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(file, weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint.get("model") or checkpoint["state_dict"]
    return state


def query_folder(folder: Path) -> str:
    (query,) = folder.glob("data/*/query")
    return str(query)


@pytest.mark.parametrize("host", CHECKPOINT)
def test_an_old_run_resumes_with_its_old_keys(folder: Path, host: str) -> None:
    need(host)
    run = folder / host
    expected = weights_in(run / CHECKPOINT[host])
    (run / CHECKPOINT[host]).unlink()
    config = str(run / "config.yaml")
    printed = selcon(folder, "train", "--config-file", config, "--resume")
    for old, new in RENAMED.items():
        spelled = (old, new) if host == "fastreid" else (old.lower(), new.lower())
        assert any(
            spelled[0] in line and spelled[1] in line for line in printed.splitlines()
        )
    # The unbroken run of version 0.1.0 ended with these weights and banks.
    found = weights_in(run / CHECKPOINT[host])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], err_msg=name, **CLOSE)


@pytest.mark.parametrize("host", CHECKPOINT)
def test_an_old_checkpoint_embeds_as_it_did(folder: Path, host: str) -> None:
    need(host)
    output = folder / "features.npz"
    weights = str(folder / host / CHECKPOINT[host])
    selcon(
        folder, "extract", "--images", query_folder(folder), "--weights", weights,
        "--output", str(output),
    )  # fmt: skip
    found, expected = np.load(output), np.load(folder / host / "features.npz")
    assert [Path(p).name for p in found["paths"]] == [
        Path(p).name for p in expected["paths"]
    ]
    np.testing.assert_allclose(found["features"], expected["features"], **CLOSE)


def test_reports_of_old_runs_are_written(folder: Path) -> None:
    for host in CHECKPOINT:
        need(host)
        selcon(folder, "report", host)
        page = (folder / host / "report.html").read_text()
        assert "SelConCluster" in page
        # Its metrics.json says outlier_share.
        assert collect_run(folder / host).curve("outlier_ratio").values == (0.0, 0.0)
    selcon(folder, "report", *CHECKPOINT, "--output", "compared.html")
    assert "SelConCluster" in (folder / "compared.html").read_text()


def test_an_old_index_is_searched_and_grows(folder: Path) -> None:
    need("fastreid")
    from selcon_plugin import Index

    index = Index.open(folder / "index")
    assert len(index) == 10
    expected = np.load(folder / "fastreid" / "features.npz")["features"]
    query = next(Path(query_folder(folder)).glob("*.jpg"))
    printed = selcon(folder, "search", "--index", "index", "--top", "1", str(query))
    assert query.name in printed
    (gallery,) = folder.glob("data/*/bounding_box_test")
    selcon(folder, "index", "--index", "index", "--add", str(gallery))
    assert len(Index.open(folder / "index")) == 10 + len(list(gallery.glob("*.jpg")))
    assert expected.shape == (10, 16)
