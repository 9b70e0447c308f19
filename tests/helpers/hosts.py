"""Skip marks for missing hosts, and fresh interpreters that have imported no host."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

needs_fastreid = pytest.mark.skipif(
    importlib.util.find_spec("fastreid") is None, reason="FastReID is not installed"
)
needs_torchreid = pytest.mark.skipif(
    importlib.util.find_spec("torchreid") is None, reason="torchreid is not installed"
)


def run_python(code, *, path=()):
    """Run code in a fresh interpreter and return the JSON value on its last line."""
    setup = f"import sys; sys.path[:0] = {[str(ROOT), *map(str, path)]!r}\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", setup + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
