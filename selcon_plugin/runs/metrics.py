"""Reading and writing of a run's ``metrics.json``, one JSON object per line.

The format is FastReID's; it is also used with torchreid.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from selcon_plugin.io.atomic import FileWriteError, write_atomically
from selcon_plugin.renamed import present_metrics

METRICS_FILE = "metrics.json"
_LARGEST = 1e300  # no measurement is larger
# Key of a line with the identity of the run that the following lines are of.
_RUN = "run"


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the metrics written during training.

    Lines that are not JSON objects are skipped: a killed run may leave a partial last line.
    If a resumed run repeated iterations, the values written last are used. Lines of another
    run that trained in the same folder before are skipped as well.

    Args:
        path: Path of ``metrics.json``, with one JSON object with ``iteration`` per line.

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
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        if _RUN in record and record[_RUN] != identity:
            # The lines before it are of another run.
            identity = record[_RUN]
            by_iteration.clear()
        record = {name: v for name, v in present_metrics(record).items() if _is_number(v)}
        if isinstance(record.get("iteration"), int):
            by_iteration.setdefault(record["iteration"], {}).update(record)
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


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
            stream.write(json.dumps({"iteration": step, **finite}, sort_keys=True) + "\n")
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
    write_atomically(json.dumps({_RUN: identity}) + "\n", Path(folder, METRICS_FILE))


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
