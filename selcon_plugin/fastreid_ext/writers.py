"""FastReID's writers of metrics, which open their files only when the run has begun."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from fastreid.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)

from selcon_plugin.runs.metrics import METRICS_FILE, metrics_line


class SealedWriter(JSONWriter):
    """FastReID's writer of ``metrics.json``, with a checksum in each line.

    Args:
        file: File to append to.
    """

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self._file_handle = _SealedLines(self._file_handle)


class _SealedLines:
    """Stream that adds a checksum to each line of JSON that is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        for line in text.splitlines():
            self._stream.write(metrics_line(json.loads(line)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
        LateWriter(lambda: SealedWriter(os.path.join(folder, METRICS_FILE))),
        LateWriter(lambda: TensorboardXWriter(folder)),
    ]
