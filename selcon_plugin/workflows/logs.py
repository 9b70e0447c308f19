"""Logging of a command into a file, with warnings and progress on the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from selcon_plugin.engine.progress import on_terminal
from selcon_plugin.hosts import host_names

__all__ = ["quiet_logging"]


@contextlib.contextmanager
def quiet_logging(file: Path) -> Iterator[None]:
    """Log into a file, and show only warnings and progress on the terminal.

    Args:
        file: File to append to.

    Yields:
        Nothing; the loggers are restored afterwards.
    """
    to_file = logging.FileHandler(file)
    form = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
    to_file.setFormatter(logging.Formatter(form))
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setFormatter(logging.Formatter("      %(levelname)s: %(message)s"))
    to_terminal.setLevel(logging.WARNING)
    handlers: dict[str, list[logging.Handler]] = {
        **{name: [to_file, to_terminal] for name in host_names()},
        "selcon_plugin": [to_file, to_terminal],
        "selcon_plugin.engine.progress": [to_file],
        "py.warnings": [to_file],  # warnings of libraries, which the user cannot fix
    }
    if not on_terminal():  # without progress bars
        lines = logging.StreamHandler(sys.stderr)
        lines.setFormatter(logging.Formatter("      %(message)s"))
        handlers["selcon_plugin.engine.progress"].append(lines)
    loggers = [logging.getLogger(name) for name in handlers]
    earlier = [(log.handlers, log.level, log.propagate) for log in loggers]
    for log in loggers:
        log.handlers, log.propagate = handlers[log.name], False
        log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for log, (old_handlers, level, propagate) in zip(loggers, earlier, strict=True):
            log.handlers, log.propagate = old_handlers, propagate
            log.setLevel(level)
        to_file.close()
