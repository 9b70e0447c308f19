"""Name a file whose reading does not end, in whatever process or thread reads it.

A network drive that hangs, or a file that is expensive to decode, blocks its reader in the
system or in a decoder, where nothing can interrupt it. A thread of each process that reads
images notices it and logs the name of the file, so that a person knows why nothing moves. A
loader with reading processes gives up after :func:`loader_timeout`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from selcon_plugin.io.names import printable

logger = logging.getLogger(__name__)

# A crop takes milliseconds to read; the largest image that is read takes some seconds.
SLOW_SECONDS = 30.0
_LOADER_SECONDS = 600.0
_INTERVAL = 5.0


class HungReaderError(ValueError):
    """Error for a reading process that has not answered for a long time."""


class _Watch:
    """Files that are being read in this process, and the thread that looks at them."""

    def __init__(self) -> None:
        self._process = 0
        self._open: dict[int, tuple[str | os.PathLike[str], float]] = {}

    @contextmanager
    def reading(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Watch the reading of a file in the current thread."""
        if self._process != os.getpid():  # also in a process that was forked
            self._process, self._open = os.getpid(), {}
            threading.Thread(target=self._look, name="slow reads", daemon=True).start()
        thread = threading.get_ident()
        self._open[thread] = (path, time.monotonic())
        try:
            yield
        finally:
            self._open.pop(thread, None)

    def _look(self) -> None:
        named: set[tuple[str | os.PathLike[str], float]] = set()
        while True:
            time.sleep(min(_INTERVAL, SLOW_SECONDS / 2))
            now = time.monotonic()
            # A snapshot: other threads add and remove files meanwhile.
            entries = set(self._open.copy().values())
            for entry in entries - named:
                path, start = entry
                if now - start > SLOW_SECONDS:
                    named.add(entry)
                    logger.warning(
                        "%s: not read after %.0f s: the drive hangs, or it is damaged",
                        printable(path),
                        now - start,
                    )
            named &= entries


watch = _Watch()


def loader_timeout(num_workers: int) -> float:
    """Return the seconds after which a loader gives up a reading process.

    Args:
        num_workers: Number of reading processes of the loader.

    Returns:
        600, or ``SELCON_READ_TIMEOUT`` of the environment; 0, which means never, without
        reading processes.

    Raises:
        ValueError: If the variable is not a number of seconds of 0 or more.
    """
    if not num_workers:
        return 0.0
    text = os.environ.get("SELCON_READ_TIMEOUT", "")
    try:
        seconds = float(text) if text else _LOADER_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"SELCON_READ_TIMEOUT must be a number of seconds, got {text!r}")
    return seconds


@contextmanager
def hung_readers_named() -> Iterator[None]:
    """Raise one line if a loader gives up a reading process.

    Yields:
        Nothing.

    Raises:
        HungReaderError: If a loader of torch has timed out.
        RuntimeError: Any other error of this kind, as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        raise HungReaderError(
            "a process that reads images has not answered for "
            f"{loader_timeout(1):g} s: a warning above names the file. Repair or remove "
            "it, or wait for the drive, and repeat the command; SELCON_READ_TIMEOUT sets "
            "the number of seconds"
        ) from error
