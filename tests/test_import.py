from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import selcon_plugin

ROOT = Path(selcon_plugin.__file__).parents[1]
# Where hosts may be imported: adapters, their shims, and what only calls them.
NOT_CORE = ("compat", "cli", "doctor")

PROGRAM = """
import importlib, json, pkgutil, sys
import selcon_plugin

def core_modules(package):
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        stem = info.name.rpartition(".")[2]
        if stem.endswith("_ext") or stem in sys.argv[1:] or stem == "__main__":
            continue
        module = importlib.import_module(info.name)
        yield info.name
        if info.ispkg:
            yield from core_modules(module)

imported = list(core_modules(selcon_plugin))
hosts = [name for name in sys.modules if name.split(".")[0] in ("fastreid", "torchreid")]
print(json.dumps([imported, hosts]))
"""


def test_core_imports_no_host() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *NOT_CORE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    imported, hosts = json.loads(result.stdout)
    assert hosts == []
    for module in ("distance", "features", "losses.selective_contrastive", "methods.base"):
        assert f"selcon_plugin.{module}" in imported
