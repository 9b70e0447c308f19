"""FastReID's log: everything in the run's log.txt, and a short form on the terminal."""

from __future__ import annotations

import logging
import sys

from fastreid.utils import comm
from fastreid.utils.logger import setup_logger

from selcon_plugin.engine.console import ShortOutput

# FastReID's loggers whose lines are shown on the terminal.
_SHOWN = (
    "fastreid.engine.train_loop",
    "fastreid.evaluation.testing",
    "fastreid.utils.checkpoint",
)
_handlers: list[logging.Handler] = []  # those of the last run in this process


def begin_log(folder: str) -> None:
    """Set up FastReID's log for a run, before FastReID itself does.

    The handlers of an earlier run in this process are removed: its log file would receive
    the lines of this run as well.

    Args:
        folder: Folder of the run.
    """
    log, ours = logging.getLogger("fastreid"), logging.getLogger("selcon_plugin")
    for handler in _handlers:
        log.removeHandler(handler)
        ours.removeHandler(handler)
    earlier = list(log.handlers)
    setup_logger.cache_clear()
    setup_logger(folder, distributed_rank=comm.get_rank())
    _handlers[:] = [handler for handler in log.handlers if handler not in earlier]
    for handler in _handlers:
        if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
            handler.addFilter(ShortOutput("fastreid", _SHOWN))
