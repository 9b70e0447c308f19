"""Log messages of this package in a torchreid run, where logging is not set up."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from tqdm import tqdm


class _Printed(logging.Handler):
    """Handler that prints messages like torchreid, to the current standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)  # above a bar, if there is one


@contextlib.contextmanager
def messages_shown() -> Iterator[None]:
    """Print the package's log messages if logging is not set up.

    Yields:
        Nothing.
    """
    ours = logging.getLogger("selcon_plugin")
    if ours.hasHandlers():
        yield
        return
    handler, level = _Printed(), ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
