"""Runs of the study: rows of ``selcon bench`` with their commands."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from market_study.protocols import CONFIGS, Options
from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.runs.results import read_results

_CHECKOUT = CONFIGS.parent
_RESULTS = "results.json"
_RECORD = ".variant.json"
# A stopped bench lets its run finish a step and write a checkpoint.
_STOP_SECONDS = 120.0


class BudgetSpentError(Exception):
    """Error for a spent time budget; the same command resumes."""


@dataclass(frozen=True)
class Budget:
    """Time budget of a study.

    Attributes:
        minutes: Budget in minutes; None for no limit.
    """

    minutes: float | None = None
    _begun: float = field(default_factory=time.monotonic)

    def seconds_left(self) -> float | None:
        """Return the remaining seconds, at least 0; None for no limit."""
        if self.minutes is None:
            return None
        return max(0.0, self.minutes * 60 - (time.monotonic() - self._begun))


@dataclass(frozen=True)
class Variant:
    """Config with changes, run on several seeds.

    Attributes:
        method: Name of the row.
        name: Name of the changes.
        config: Config file.
        options: All options except those of a single run.
        data: Root folder of the data sets.
        folder: Folder with one folder per seed.
        commit: Commit of the code at the start.
    """

    method: str
    name: str
    config: Path
    options: Options
    data: Path
    folder: Path
    commit: str = ""

    @property
    def record(self) -> Path:
        """Path of the file that describes the variant."""
        return self.folder.with_name(f"{self.name}{_RECORD}")

    def save(self) -> None:
        """Write the record, unless an earlier part of the study did."""
        if not self.record.is_file():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            content = {**vars(self), "commit": _commit()}
            write_atomically(json.dumps(content, indent=1, default=str) + "\n", self.record)

    @classmethod
    def load(cls, record: Path) -> Variant:
        """Read a variant from its record."""
        content = json.loads(record.read_text(encoding="utf-8"))
        for name in ("config", "data", "folder"):
            content[name] = Path(content[name])
        return cls(**content)

    def results(self) -> dict[int, dict[str, Any]]:
        """Read the finished runs.

        Returns:
            Content of ``results.json`` by seed.
        """
        found = {
            int(file.parent.name.removeprefix("seed")): read_results(file)
            for file in self.folder.glob(f"seed*/{_RESULTS}")
        }
        return dict(sorted(found.items()))

    def command(self, seed: int = 0) -> str:
        """Return the command that reproduces a single run."""
        options = {
            **self.options,
            "MODEL.SELCON.SEED": seed,
            "OUTPUT_DIR": str(self.folder / f"seed{seed}"),
        }
        words = [word for key, value in options.items() for word in (key, _word(value))]
        config = _relative(self.config)
        train = ["selcon", "train", "--config-file", config, *words]
        return f"FASTREID_DATASETS={shlex.quote(str(self.data))} {shlex.join(train)}"


def _word(value: Any) -> str:
    # Lists use double quotes, since the argument itself has single quotes in a shell.
    return json.dumps(value) if isinstance(value, (list, tuple)) else str(value)


def _relative(file: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(file.relative_to(_CHECKOUT))
    return str(file)


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(
        asked, cwd=_CHECKOUT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def variants_in(folder: Path) -> list[Variant]:
    """Read all variants that were started.

    Args:
        folder: Folder of a phase of the study, with one folder per method.

    Returns:
        The variants, sorted by method and name.
    """
    return [Variant.load(file) for file in sorted(folder.glob(f"*/*{_RECORD}"))]


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as the nodes of a config file.

    Example:
        >>> nested({"A.B": 1, "A.C": 2, "D": 3})
        {'A': {'B': 1, 'C': 2}, 'D': 3}
    """
    result: dict[str, Any] = {}
    for key, value in options.items():
        *path, last = key.split(".")
        node = result
        for part in path:
            node = node.setdefault(part, {})
        node[last] = list(value) if isinstance(value, tuple) else value
    return result


def run_variants(variants: Sequence[Variant], seeds: int, budget: Budget) -> None:
    """Train and evaluate the unfinished variants of one method.

    Args:
        variants: Variants with the same folder and data root.
        seeds: Number of seeds; seeds 0..seeds-1 are run.
        budget: Time budget.

    Raises:
        BudgetSpentError: If there is no time left. ``SystemExit`` if the bench could not
            start; its output gives the reason.
    """  # noqa: DOC501  (described above)
    missing = [v for v in variants if set(range(seeds)) - set(v.results())]
    if not missing:
        return
    left = budget.seconds_left()
    if left == 0:
        raise BudgetSpentError
    for variant in missing:
        variant.save()
        base = {"_BASE_": str(variant.config), **nested(variant.options)}
        write_atomically(yaml.safe_dump(base, sort_keys=False), _config_file(variant))
    first = missing[0]
    command = [
        *(sys.executable, "-m", "selcon_plugin", "bench"),
        *("--configs", *(str(_config_file(variant)) for variant in missing)),
        *("--seeds", str(seeds), "--output", str(first.folder.parent)),
    ]
    environment = {**os.environ, "FASTREID_DATASETS": str(first.data)}
    process = subprocess.Popen(command, env=environment)
    with _ended(process):
        try:
            process.wait(timeout=left)
        except subprocess.TimeoutExpired as error:
            raise BudgetSpentError from error
    # Status 1 means that a run failed: the others are used, and the tables list it.
    if process.returncode not in (0, 1):
        raise SystemExit(process.returncode)


def _config_file(variant: Variant) -> Path:
    return variant.folder.with_name(f"{variant.name}.yml")


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Terminate the bench when the study ends."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
