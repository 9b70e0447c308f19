"""The short form of tools/faults/kill_and_resume.py: a few kills, in both hosts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastreid")
pytest.importorskip("torchreid")

TOOL = Path(__file__).parents[2] / "tools" / "faults" / "kill_and_resume.py"


def test_killed_runs_end_as_the_uninterrupted_ones(tmp_path):
    report = tmp_path / "report.md"
    finished = subprocess.run(
        [
            *(sys.executable, str(TOOL), "--kills", "3", "--report", str(report)),
            *("--cases", "SelConCluster", "torchreid/SpCL"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=TOOL.parents[2],
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads(report.with_suffix(".json").read_text())
    assert summary["kills"] + summary["stops"] >= 6
    assert summary["runs_compared"] >= 2
    assert summary["problems"] == []
    assert "| SelConCluster |" in report.read_text()
