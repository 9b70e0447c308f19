"""Random configs, JSON files and arguments: success, or one line and status 2.

``tools/faults/fuzz.py`` draws the cases; it also runs for longer by hand.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from helpers.hosts import needs_fastreid, needs_torchreid

pytestmark = [needs_fastreid, needs_torchreid]

TOOL = Path(__file__).resolve().parents[2] / "tools" / "faults" / "fuzz.py"
SECONDS = 20.0
FIRST_SEED = 5000


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:Overwriting")  # a file that another test imported
def test_commands_succeed_or_end_with_one_line(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTREID_DATASETS", str(tmp_path / "runs" / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SELCON_TRACEBACK", raising=False)
    seeds = iter(range(FIRST_SEED, FIRST_SEED + 80))
    until = time.monotonic() + SECONDS
    faults = list(tool.run_seeds(seeds, tmp_path / "runs", until=until))
    assert not faults, "\n".join(
        f"{seed}: {tool.draw_case(seed).argv}\n{fault}" for seed, fault in faults
    )


def test_cases_are_those_of_their_seeds(tool: ModuleType) -> None:
    for seed in range(30):
        assert tool.draw_case(seed) == tool.draw_case(seed)
    commands = {tool.draw_case(seed).argv[0] for seed in range(300)}
    assert commands >= {"train", "eval", "report", "search", "index", "cluster", "adapt"}


@pytest.mark.parametrize(
    ("status", "out", "err", "changed", "fault"),
    [
        (0, "", "", True, ""),
        (2, "", "selcon x: error: no\n", False, ""),
        (2, "", "a warning\nselcon x: error: no\n", False, ""),
        (2, "", "selcon x: error: no\nmore\n", False, "not one line"),
        (2, "", "", False, "not one line"),
        (1, "", "", False, "status 1"),
        (2, "Traceback (most", "selcon x: error: no\n", False, "traceback"),
        (2, "", "selcon x: error: no\n", True, "changed"),
    ],
)
def test_faults_are_seen(
    tool: ModuleType, status: int, out: str, err: str, changed: bool, fault: str
) -> None:
    after = {"file": b"new"} if changed else {}
    found = tool._fault(status, out, err, {}, after)
    assert (fault in found) if fault else not found
