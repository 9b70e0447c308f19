"""Messages of this package on the terminal of a torchreid run, which sets up no logging."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from tqdm import tqdm


class _Printed(logging.Handler):
    """Shows messages as torchreid shows its own: on what is standard output by then."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)  # above a bar, if there is one


@contextlib.contextmanager
def messages_shown() -> Iterator[None]:
    """Print what the package logs, where nobody has set up logging.

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
