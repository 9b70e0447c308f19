"""Progress display of a run, with one line for each of its stages.

On a terminal a stage is a bar with the remaining time, and a log line when it ends. Without
a terminal there are only log lines, every minute and at the end.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from selcon_plugin.distributed import rank
from selcon_plugin.io.streams import is_terminal
from selcon_plugin.runs.results import peak_gpu_memory_mib, peak_memory_mib

logger = logging.getLogger(__name__)

_LINE_SECONDS = 60.0  # seconds between two log lines of one stage
_REFRESH_SECONDS = 0.5  # seconds between two readings of the memory for a bar
# Loggers whose lines on a terminal must not overwrite the bar.
_LOGGERS = ["", "selcon_plugin"]


def on_terminal() -> bool:
    """Return whether bars are shown: on the main process, if all output is a terminal."""
    return rank() == 0 and is_terminal(sys.stdout) and is_terminal(sys.stderr)


def protect_bars_from(logger_name: str) -> None:
    """Print the lines of a logger above the progress bars, as those of this package.

    Args:
        logger_name: Logger with handlers of its own, such as that of a host.
    """
    if logger_name not in _LOGGERS:
        _LOGGERS.append(logger_name)


def duration(seconds: float, *, approximate: bool = False) -> str:
    """Format a duration: ``8.4 s``, ``2 min 5 s``, ``3 h 20 min``.

    Args:
        seconds: Duration in seconds, at least 0.
        approximate: Whether the duration is a rough estimate, which is formatted in one
            unit only: ``4 s``, ``10 min``, ``2.5 h``.

    Returns:
        The duration in at most two units.

    Example:
        >>> duration(8000), duration(75.2), duration(3.14)
        ('2 h 13 min', '1 min 15 s', '3.1 s')
    """
    if approximate:
        return _approximate_duration(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, whole = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {whole} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _approximate_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"


def memory() -> str:
    """Format the peak memory of this process, and that on its GPU if it has one."""
    text = f"{peak_memory_mib() / 1024:.1f} GiB"
    on_gpu = peak_gpu_memory_mib()
    return f"{text}, GPU {on_gpu / 1024:.1f} GiB" if on_gpu else text


class Stage:
    """Progress, remaining time and memory of one stage, shown only by the main process.

    A stage is a context manager. A stage that ends with an error logs no final line.

    Args:
        name: Name of the stage, for instance ``"Training, epoch 3 of 20"``.
        total: Total number of units; None where it is unknown.
        unit: Name of the counted unit.
        done: Number of units done before.
    """

    def __init__(
        self, name: str, total: int | None = None, *, unit: str = "batch", done: int = 0
    ) -> None:
        self._name, self._unit, self._total = name, unit, total
        self._first = self._done = done
        self._note = ""

    def __enter__(self) -> Stage:
        self._started = self._logged = time.monotonic()
        self._refreshed = 0.0
        self._silent = rank() > 0
        self._bar: Any = None
        self._open = contextlib.ExitStack()
        if on_terminal():
            self._open.enter_context(_lines_above_bars())
            self._bar = tqdm(
                total=self._total,
                initial=self._done,
                desc=self._name,
                unit=self._unit,
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
                bar_format=None if self._total else "{desc}{postfix}",
            )
        return self

    def update(self, note: str = "") -> None:
        """Count one more unit.

        Args:
            note: Text to show in addition, such as the loss.
        """
        if self._silent:
            return
        self._done += 1
        self._note = note
        now = time.monotonic()
        if self._bar is not None:
            if now - self._refreshed >= _REFRESH_SECONDS:
                self._refreshed = now
                self._bar.set_postfix_str(_joined(note, memory()), refresh=False)
            self._bar.update()
        elif now - self._logged >= _LINE_SECONDS and self._done != self._total:
            self._logged = now
            logger.info("%s: %s", self._name, self._so_far(now))

    def _so_far(self, now: float) -> str:
        count = f"{self._done} {_plural(self._unit)}"
        left = ""
        if self._total is not None:
            count = f"{self._done} of {self._total} {_plural(self._unit)}"
            pace = (now - self._started) / (self._done - self._first)
            left = f"{duration(pace * (self._total - self._done))} left"
        return _joined(count, left, self._note, memory())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        self._open.close()
        if self._silent or kind is not None:
            return
        seconds = duration(time.monotonic() - self._started)
        done = self._done - self._first
        count = f"{done} {_plural(self._unit, done)} in {seconds}" if done else seconds
        logger.info("%s: %s", self._name, _joined(count, self._note, memory()))


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _plural(unit: str, count: int = 2) -> str:
    if count == 1:
        return unit
    return f"{unit}es" if unit.endswith("ch") else f"{unit}s"


@contextlib.contextmanager
def _lines_above_bars() -> Iterator[None]:
    """Keep log lines on the terminal from overwriting a bar."""
    # tqdm would add a handler to a logger that has none on the terminal, so that a line
    # appeared twice, and would drop the level of the handler that it replaces.
    levels = {
        log: min(handler.level for handler in handlers)
        for log in map(logging.getLogger, _LOGGERS)
        if (handlers := [h for h in log.handlers if _writes_to_terminal(h)])
    }
    with logging_redirect_tqdm(list(levels)):
        for log, level in levels.items():
            log.handlers[-1].setLevel(level)
        yield


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and (
        handler.stream in (sys.stdout, sys.stderr)
    )


class ProgressLoader:
    """Loader that shows the progress of its own iteration.

    Args:
        loader: Loader of batches; its attributes are available on this object too.
        name: Name of the stage.
    """

    def __init__(self, loader: Any, name: str) -> None:
        self._loader, self._name = loader, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._loader, attribute)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return with_progress(self._loader, self._name)


def with_progress(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """Show the progress of an iteration over batches.

    Args:
        batches: Batches to iterate over.
        name: Name of the stage.

    Yields:
        The batches.
    """
    total = len(batches) if isinstance(batches, Sized) else None
    with Stage(name, total) as stage:
        for batch in batches:
            yield batch
            stage.update()


class TrainingProgress:
    """Progress of a training, with one stage per epoch and the time left in the whole run.

    The remaining time is estimated from the run's own pace, including clustering and
    evaluation.

    Args:
        epochs: Total number of epochs.
        steps_per_epoch: Optimizer steps per epoch.
        first_step: Steps done before, by an earlier part of the run.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, first_step: int = 0) -> None:
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        self._first_step, self._started = first_step, time.monotonic()
        self._stage: Stage | None = None

    def begin_step(self, step: int) -> None:
        """Open the stage of the epoch, unless it is open already.

        Args:
            step: Steps done before this one.
        """
        if self._stage is None:
            epoch, done = divmod(step, self._steps_per_epoch)
            self._stage = Stage(
                f"Training, epoch {epoch + 1} of {self._epochs}",
                self._steps_per_epoch,
                unit="step",
                done=done,
            )
            self._stage.__enter__()

    def end_step(self, step: int, loss: float | None = None) -> None:
        """Count a step, and close the stage after the last step of an epoch.

        Args:
            step: Steps done before this one.
            loss: Loss of the step, if it is known.
        """
        assert self._stage is not None
        done = step + 1
        pace = (time.monotonic() - self._started) / (done - self._first_step)
        left = pace * (self._epochs * self._steps_per_epoch - done)
        run = f"{duration(left)} to the end of the run" if left else ""
        self._stage.update(_joined("" if loss is None else f"loss {loss:.3f}", run))
        if done % self._steps_per_epoch == 0:
            self._stage.__exit__(None, None, None)
            self._stage = None

    def close(self) -> None:
        """Close the stage of an unfinished epoch."""
        if self._stage is not None:
            self._stage.__exit__(RuntimeError, None, None)
            self._stage = None
