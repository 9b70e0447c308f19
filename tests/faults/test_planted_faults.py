"""The mutation check: its list fits the code, and a short form of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "faults" / "planted_faults.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_faults", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_faults"] = module
    spec.loader.exec_module(module)
    return module


def test_every_fault_fits_the_code(tool: ModuleType) -> None:
    assert len({fault.name for fault in tool.FAULTS}) == len(tool.FAULTS) >= 15
    for fault in tool.FAULTS:
        source = (ROOT / "selcon_plugin" / fault.file).read_text()
        assert source.count(fault.right) == 1, fault.name
        assert (ROOT / fault.tests[0]).exists(), fault.name
        compile(source.replace(fault.right, fault.wrong), fault.file, "exec")


def test_three_faults_are_caught(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["momentum_side", "negatives_overlap_positives", "sampler_ignores_start"]
    report = tmp_path / "report.md"
    assert tool.main(["--only", *names, "--report", str(report)]) == 0
    assert capsys.readouterr().out.count("caught") == 3
    assert "**3 of 3 caught**" in report.read_text()


def test_a_fault_that_no_test_sees_is_missed(tool: ModuleType, tmp_path: Path) -> None:
    tool.copy_repository(tmp_path)
    fault = tool.Fault(
        "comment",
        "none",
        "selection.py",
        "# topk, not a full sort",
        "# not a full sort",
        ("tests/test_selection.py",),
    )
    assert tool.try_fault(tmp_path, fault).verdict == "missed"
    broken = tool.Fault(
        "syntax", "none", "selection.py", "import functools", "import no_such", fault.tests
    )
    assert tool.try_fault(tmp_path, broken).verdict == "broken"
    with pytest.raises(ValueError, match="must be there once"):
        tool.try_fault(tmp_path, tool.Fault("gone", "", "ema.py", "no such text", "", ()))
