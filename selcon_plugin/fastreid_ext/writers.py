"""Writers of metrics, which open their files only when the run has begun."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastreid.engine.hooks import PeriodicWriter
from fastreid.engine.train_loop import HookBase
from fastreid.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    TensorboardXWriter,
    get_event_storage,
)

from selcon_plugin.runs.metrics import append_metrics

_SMOOTHED = 20  # steps of FastReID's median


class LateWriter(EventWriter):
    """Writer that is built when it writes first.

    FastReID builds its writers with the trainer: a run that is refused afterwards would
    have written to the files of the run in its folder.

    Args:
        build: Builds the writer.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._writer: Any = None

    def write(self) -> None:
        """Write the latest metrics."""
        if self._writer is None:
            self._writer = self._build()
        self._writer.write()

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._writer is not None:
            self._writer.close()


class _NewScalars:
    """The scalars of FastReID's storage since the last call, by step.

    FastReID's writers skip every scalar of a step of which they have written one: after a
    write between the last step of an epoch and its evaluation, that of the evaluation.
    """

    def __init__(self) -> None:
        self._written: dict[str, int] = {}

    def take(self) -> dict[int, dict[str, float]]:
        """Return the latest values that were not returned before, by step and name."""
        latest = get_event_storage().latest_with_smoothing_hint(_SMOOTHED)
        found: dict[int, dict[str, float]] = {}
        for name, (value, step) in latest.items():
            if step > self._written.get(name, -1):
                found.setdefault(step, {})[name] = value
                self._written[name] = step
        return found


class MetricsWriter(EventWriter):
    """Writer of ``metrics.json``, which may write several times in a step.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._new = _NewScalars()

    def write(self) -> None:
        """Write what is new, and bring it to the disk."""
        for step, measured in sorted(self._new.take().items()):
            append_metrics(self._folder, step, measured)


class _TensorBoardWriter(TensorboardXWriter):
    """FastReID's writer, which may write several times in a step."""

    _last_write: int

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._new = _NewScalars()

    def write(self) -> None:
        for step, measured in self._new.take().items():
            for name, value in measured.items():
                self._writer.add_scalar(name, value, step)
            self._last_write = max(self._last_write, step)
        super().write()  # pictures and histograms


def build_writers(folder: str, num_steps: int) -> list[EventWriter]:
    """Build FastReID's writers.

    Args:
        folder: Folder of the run.
        num_steps: Optimizer steps of the whole run.

    Returns:
        Writers to the log, to ``metrics.json`` and to TensorBoard.
    """
    return [
        CommonMetricPrinter(num_steps),
        MetricsWriter(folder),
        LateWriter(lambda: _TensorBoardWriter(folder)),
    ]


def write_metrics(hooks: Iterable[HookBase], *, everywhere: bool = False) -> None:
    """Write ``metrics.json`` before a checkpoint of the same step.

    A run that is killed after the checkpoint does not repeat the steps before it.

    Args:
        hooks: All hooks of the trainer.
        everywhere: Whether to write to the log and to TensorBoard as well.
    """
    for hook in hooks:
        if isinstance(hook, PeriodicWriter):
            for writer in hook._writers:
                if everywhere or isinstance(writer, MetricsWriter):
                    writer.write()
