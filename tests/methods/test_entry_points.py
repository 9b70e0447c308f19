"""Methods of installed packages: the entry-point group ``selcon_plugin.methods``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import selcon_plugin

ROOT = Path(selcon_plugin.__file__).parents[1]

METHOD = """
from selcon_plugin.methods import register_method
from selcon_plugin.methods.cluster_contrast import ClusterContrast

@register_method("Elsewhere")
class Elsewhere(ClusterContrast):
    "A method of another package."
"""

PROGRAM = """
from selcon_plugin.methods import build_method, method_names
assert "Elsewhere" in method_names()
print(type(build_method("Elsewhere", 10, 8)).__module__)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Lay out a package with an entry point, as pip installs it."""
    folder = tmp_path / "site"
    metadata = folder / "reid_elsewhere-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: reid-elsewhere\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[selcon_plugin.methods]\nelsewhere = reid_elsewhere\n"
    )
    (folder / "reid_elsewhere.py").write_text(METHOD)
    return folder


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installed_package_adds_its_method(installed: Path) -> None:
    done = run(installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reid_elsewhere"


def test_a_package_that_fails_to_load_is_reported(installed: Path) -> None:
    (installed / "reid_elsewhere.py").write_text("import no_such_module")
    done = run(installed)
    assert done.returncode != 0
    for word in (
        "reid-elsewhere",
        "elsewhere = reid_elsewhere",
        "no_such_module",
        "ninstall",
    ):
        assert word in done.stderr
