"""Log messages of this package in a torchreid run, where logging is not set up."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator

from tqdm import tqdm

from selcon_plugin.engine.console import ShortOutput, is_verbose


class _Printed(logging.Handler):
    """Handler that prints messages like torchreid, to the current standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)  # above a bar, if there is one
        except OSError:  # the terminal has gone, the run continues
            self.handleError(record)


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
    handler.addFilter(ShortOutput())
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


@contextlib.contextmanager
def torchreid_hidden() -> Iterator[None]:
    """Hide what torchreid prints, unless it fails or the output is verbose.

    Yields:
        Nothing.
    """
    if is_verbose():
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        sys.stdout.write(printed.getvalue())
        raise
