"""Mutation check: its list matches the code, and a short run of it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
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


def test_every_fault_matches_the_code(tool: ModuleType) -> None:
    assert len({fault.name for fault in tool.FAULTS}) == len(tool.FAULTS) >= 15
    for fault in tool.FAULTS:
        source = (ROOT / "selcon_plugin" / fault.file).read_text()
        assert source.count(fault.right) == 1, fault.name
        assert (ROOT / fault.tests[0]).exists(), fault.name
        compile(source.replace(fault.right, fault.wrong), fault.file, "exec")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that has not imported the package."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        cwd=TOOL.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_three_faults_are_caught(tmp_path: Path) -> None:
    names = ["momentum_side", "negatives_overlap_positives", "sampler_ignores_start"]
    report = tmp_path / "report.md"
    done = run(str(TOOL), "--only", *names, "--report", str(report))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("caught") == 3
    assert "**3 of 3 caught**" in report.read_text()


VERDICTS = """
import sys
from pathlib import Path
import planted_faults as tool
folder = Path(sys.argv[1])
tool.copy_repository(folder)
changes = (("# topk instead of", "# instead of"), ("import functools", "import no_such"))
for change in changes:
    fault = tool.Fault("fault", "", "selection.py", *change, ("tests/test_selection.py",))
    print(tool.try_fault(folder, fault).verdict)
"""


def test_verdicts_of_missed_and_of_broken_faults(tmp_path: Path) -> None:
    done = run("-c", VERDICTS, str(tmp_path))
    assert done.stdout.split() == ["missed", "broken"], done.stderr


def test_fault_that_no_longer_matches_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    tool.copy_repository(tmp_path)
    with pytest.raises(ValueError, match="must occur once"):
        tool.try_fault(
            tmp_path, tool.Fault("gone", "", "models/ema.py", "no such text", "", ())
        )


def test_package_that_is_imported_already_is_refused(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "selcon_plugin", ModuleType("selcon_plugin"))
    with pytest.raises(RuntimeError, match="already imported"):
        tool.run_tests(tmp_path, ())
