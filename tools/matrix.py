"""Install and try the package with the oldest and the newest Python and torch.

    python tools/matrix.py                    # or: make matrix
    python tools/matrix.py --only newest --keep

Each row gets an environment of its own, as a user makes one: pip, torch and torchvision,
``.[test]``, and both hosts. In it run ``selcon doctor``, a demo of one epoch, and the tests
of what depends on versions. Nothing is asked: the command suits a nightly job. It prints a
table, writes it to ``FOLDER/matrix.md`` beside the logs, and exits with 1 if a row failed.
A row downloads up to 3 GB and takes up to 6 GB, which are deleted after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON = (3, 10)  # as setup.py says; a test compares them
# The oldest torch that setup.py admits, and the torchvision that belongs to it.
OLDEST_TORCH = ("torch==2.4.0", "torchvision==0.19.0")
NEWEST_TORCH = ("torch", "torchvision")
NO_DEPS = ("fastreid==1.4.0", "torchreid==0.2.5", "efficientnet_lite_pytorch==0.1.0")
TESTS = (
    *("tests/compat", "tests/cli", "tests/test_import.py", "tests/test_installing.py"),
    *("tests/test_other_systems.py", "tests/workflows/test_fit.py"),
    *("tests/retrieval/test_index.py", "tests/io"),
)
DEMO = ("demo", "--epochs", "1", "--output")
SHOWN = ("python", "torch", "torchvision", "numpy")
COLUMNS = ("row", *SHOWN, "doctor", "demo", "tests", "minutes")


@dataclasses.dataclass
class Row:
    """One environment of the matrix and what came of it.

    Attributes:
        name: Name in the table and of the folder.
        python: Interpreter; empty if there is none of that version.
        torch: Requirements of torch and what has to fit it.
        found: Versions and results by column.
    """

    name: str
    python: str
    torch: Sequence[str]
    found: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Return whether a step failed or was not reached."""
        return any(self.found.get(step) != "ok" for step in ("doctor", "demo", "tests"))


def pythons() -> dict[tuple[int, int], str]:
    """Find the interpreters of this machine by version, from 3.10 on."""
    names = [f"python3.{minor}" for minor in range(OLDEST_PYTHON[1], 30)]
    candidates = [sys.executable, *filter(None, map(shutil.which, names))]
    for pattern in (
        "~/.pyenv/versions/*/bin/python",
        "~/.local/share/uv/python/*/bin/python",
    ):
        candidates += sorted(glob.glob(os.path.expanduser(pattern)))
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        version = _version_of(candidate)
        if version >= OLDEST_PYTHON:
            found.setdefault(version, candidate)
    return found


def _version_of(python: str) -> tuple[int, int]:
    code = "import sys, venv; print(*sys.version_info[:2], sys.prefix == sys.base_prefix)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    # Without venv, or itself one, it makes no environment; pyenv leaves names that fail.
    words = done.stdout.split()
    if done.returncode or words[2] != "True":
        return (0, 0)
    return int(words[0]), int(words[1])


def plan(found: dict[tuple[int, int], str]) -> list[Row]:
    """Combine the oldest and the newest of Python and torch.

    Args:
        found: Interpreters by version.

    Returns:
        The rows; the newest Python has no build of the oldest torch.
    """
    oldest = found.get(OLDEST_PYTHON, "")
    newest = found[max(found)] if found else ""
    return [
        Row("oldest", oldest, OLDEST_TORCH),
        Row("oldest-python", oldest, NEWEST_TORCH),
        Row("newest", newest, NEWEST_TORCH),
    ]


def cpu_index() -> list[str]:
    """Return pip's option for builds of torch without CUDA, if their index answers."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5):
            return ["--extra-index-url", CPU_INDEX]
    except OSError:
        return []


class Runner:
    """Execution of the steps of one row in its folder.

    Args:
        row: The row, whose results are filled in.
        folder: Folder of the row.
    """

    def __init__(self, row: Row, folder: Path) -> None:
        self._row = row
        self._folder = folder
        self._python = (
            folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        )

    def run(self) -> None:
        """Install, then try everything that the installation admits."""
        started = time.monotonic()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        if self._install():
            self._look()
            self._step("demo", "-m", "selcon_plugin", *DEMO, str(self._folder / "demo"))
            self._step("tests", "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
        self._row.found["minutes"] = f"{(time.monotonic() - started) / 60:.1f}"

    def _install(self) -> bool:
        venv = self._folder / "venv"
        made = self._call("install", self._row.python, "-m", "venv", str(venv))
        torch, index = self._row.torch, cpu_index()
        return (
            made
            and self._pip("--upgrade", "pip")
            and self._pip(*index, *torch)
            and self._pip(*index, *torch, "-e", f"{ROOT}[test]")
            and self._pip("--no-deps", "--no-build-isolation", *NO_DEPS)
        )

    def _pip(self, *words: str) -> bool:
        return self._call("install", str(self._python), "-m", "pip", "install", *words)

    def _look(self) -> None:
        """Run doctor, and take the versions from its report."""
        done = self._output("-m", "selcon_plugin", "doctor", "--json")
        (self._folder / "doctor.log").write_text(done.stdout + done.stderr, "utf-8")
        self._row.found["doctor"] = (
            "ok" if done.returncode == 0 else f"rc {done.returncode}"
        )
        if done.returncode in (0, 1):
            versions = json.loads(done.stdout)["versions"]
            self._row.found |= {name: str(versions[name]) for name in SHOWN}

    def _step(self, name: str, *words: str) -> None:
        passed = self._call(name, str(self._python), *words)
        self._row.found[name] = "ok" if passed else "failed"

    def _call(self, log: str, *command: str) -> bool:
        with (self._folder / f"{log}.log").open("a", encoding="utf-8") as stream:
            stream.write(f"$ {' '.join(command)}\n")
            stream.flush()
            done = subprocess.run(
                command, cwd=ROOT, env=_environment(), stdout=stream, stderr=stream
            )
        return done.returncode == 0

    def _output(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._python), *words],
            cwd=ROOT,
            env=_environment(),
            capture_output=True,
            text=True,
        )


def _environment() -> dict[str, str]:
    # The environment's own package is this checkout: nothing else may be on the path.
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table.

    Args:
        rows: Rows that ran.

    Returns:
        The table.
    """
    return "\n".join(_lines(rows)) + "\n"


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "| " + " | ".join("---" for _ in COLUMNS) + " |"
    for row in rows:
        found = {"row": row.name} | row.found
        yield "| " + " | ".join(found.get(column, "-") for column in COLUMNS) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        Exit status: 0 if every row passed, else 1.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--only", nargs="*", help="names of the rows to run")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    arguments = parser.parse_args(argv)
    rows = [r for r in plan(pythons()) if not arguments.only or r.name in arguments.only]
    for row in rows:
        folder = arguments.folder.resolve() / row.name
        print(f"{row.name}: {row.python or 'no such Python on this machine'}, {folder}")
        if row.python:
            Runner(row, folder).run()
        if not arguments.keep:
            shutil.rmtree(folder / "venv", ignore_errors=True)
        print("\n".join(_lines([row])), flush=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "matrix.md").write_text(table(rows), encoding="utf-8")
    print(f"\n{table(rows)}\nLogs and table: {arguments.folder}")
    return 1 if not rows or any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
