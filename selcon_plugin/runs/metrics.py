"""Reading and writing of a run's ``metrics.json``, one JSON object per line.

The format is FastReID's; it is also used with torchreid. The file grows during the run, so
a checksum of the whole would be wrong after a kill between two writes: each line contains
its own. A line without one is of an earlier version, or of a script that writes with
FastReID's own writer.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selcon_plugin.io.atomic import FileWriteError, write_atomically
from selcon_plugin.io.integrity import DamagedFileError, sealed_json, unsealed_json
from selcon_plugin.renamed import present_metrics

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
_LARGEST = 1e300  # no measurement is larger
# Key of a line with the identity of the run that the following lines are of.
_RUN = "run"


def read_metrics(
    path: str | Path, *, on_damage: Callable[[str], None] | None = None
) -> list[dict[str, float]]:
    """Read the metrics written during training.

    A line that is no JSON object, or does not match its checksum, is left out. A killed run
    may leave a partial last line, so one that only lacks its end is no damage. If a resumed
    run repeated iterations, the values written last are used. Lines of another run that
    trained in the same folder before are skipped as well.

    Args:
        path: Path of ``metrics.json``, with one JSON object with ``iteration`` per line.
        on_damage: Called with one sentence that names the file, if lines are damaged;
            None to log it as a warning.

    Returns:
        One dict per iteration, by increasing iteration.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there are no metrics at {file}: train a run first")
    by_iteration: dict[int, dict[str, float]] = {}
    identity = None
    damaged = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            record: dict[str, Any] = unsealed_json(line, file)
        except DamagedFileError:
            if line.strip() and not _lacks_its_end(line):
                damaged.append(number)
            continue
        if _RUN in record and record[_RUN] != identity:
            # The lines before it are of another run.
            identity = record[_RUN]
            by_iteration.clear()
        record = {name: v for name, v in present_metrics(record).items() if _is_number(v)}
        if isinstance(record.get("iteration"), int):
            by_iteration.setdefault(record["iteration"], {}).update(record)
    if damaged:
        (on_damage or logger.warning)(
            f"{file} is damaged: {len(damaged)} of its lines, the first of them line "
            f"{damaged[0]}, are left out. Restore a copy of it, or delete these lines"
        )
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def _lacks_its_end(line: bytes) -> bool:
    # The objects are flat: each brace opens or closes a whole one.
    return line.startswith(b"{") and b"}" not in line


def _is_number(value: object) -> bool:
    # A comparison with NaN is False.
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST  # type: ignore[operator]


def append_metrics(folder: str | Path, step: int, measured: Mapping[str, float]) -> None:
    """Append a line with measured values.

    Args:
        folder: Folder of the run; nothing is written if it is empty.
        step: Optimizer step of the measurement, from 0.
        measured: Values by name; non-finite values are omitted.

    Raises:
        FileWriteError: If the file cannot be written.
    """
    finite = {name: float(v) for name, v in measured.items() if math.isfinite(v)}
    if not folder or not finite:
        return
    file = Path(folder, METRICS_FILE)
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(sealed_json(dict(sorted({"iteration": step, **finite}.items()))))
            stream.flush()
            os.fsync(stream.fileno())  # before a checkpoint, after which nothing repeats it
    except OSError as error:
        raise FileWriteError(file, error) from error


def begin_metrics(folder: str | Path, identity: str) -> None:
    """Begin the metrics of a new run, without those of an earlier one in its folder.

    Args:
        folder: Folder of the run.
        identity: Identity of the run, which the first line holds.
    """
    write_atomically(sealed_json({_RUN: identity}), Path(folder, METRICS_FILE))


def end_last_line(folder: str | Path) -> None:
    """End the line at which a kill interrupted a run, so that the next one is whole.

    Args:
        folder: Folder of the run, which may have no metrics.
    """
    file = Path(folder, METRICS_FILE)
    if not file.is_file():
        return
    with file.open("r+b") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")


class LossAverage:
    """Mean losses over the steps since the last call of :meth:`take`."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = 0

    def add(self, losses: Mapping[str, float]) -> None:
        """Add the losses of a step; the entry ``loss`` is the total loss."""
        for name, value in losses.items():
            key = "total_loss" if name == "loss" else name
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Return the means by name and reset them; empty without steps."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means
