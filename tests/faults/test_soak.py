"""Soak tool: it detects growth, and a short run is flat."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "faults" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


def flat(soak: ModuleType, **changes: list[float]) -> dict[str, bool]:
    steady = {"memory_mib": 500.0, "gpu_memory_mib": 0.0, "open_files": 9, "threads": 3}
    samples = [
        soak.Sample(**steady | {name: values[i] for name, values in changes.items()})
        for i in range(50)
    ]
    return {growth.name: growth.is_flat for growth in soak.find_growth(samples)}


def test_steady_values_are_flat(soak: ModuleType) -> None:
    assert all(flat(soak).values())
    # Start-up may use any amount, and a single epoch may be an outlier.
    assert all(flat(soak, memory_mib=[100.0] * 9 + [500.0] * 41).values())
    assert all(flat(soak, open_files=[9] * 45 + [30] + [9] * 4).values())
    # A writer has its file open in most of the checked epochs.
    assert all(flat(soak, open_files=[9] * 41 + [10, 10, 9] * 3).values())


@pytest.mark.parametrize(
    ("name", "each_epoch"),
    [("memory_mib", 1.0), ("gpu_memory_mib", 0.1), ("open_files", 0.1), ("threads", 0.1)],
)
def test_a_leak_is_detected(soak: ModuleType, name: str, each_epoch: float) -> None:
    found = flat(soak, **{name: [10 + each_epoch * epoch for epoch in range(50)]})
    assert found.pop(name) is False
    assert all(found.values())


def test_too_few_epochs_are_refused(soak: ModuleType) -> None:
    with pytest.raises(ValueError, match="4 epochs are too few"):
        soak.find_growth([soak.measure()] * 4)


def test_a_short_run_is_flat(tmp_path: Path) -> None:
    pytest.importorskip("fastreid")
    report = tmp_path / "soak.md"
    # A separate process contains only the run's memory. In a process that has run
    # thousands of tests before, freed memory moves by as much as a leak would.
    options = ["--steps", "25", "--steps-per-epoch", "1", "--report", str(report)]
    run = subprocess.run(
        [sys.executable, str(TOOL), *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert report.read_text().count("| yes |") >= 3
