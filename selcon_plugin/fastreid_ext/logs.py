"""FastReID's log: everything in the run's log.txt, and a short form on the terminal."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path

from fastreid.config import CfgNode
from fastreid.utils import comm
from fastreid.utils.collect_env import collect_env_info
from fastreid.utils.env import seed_all_rng
from fastreid.utils.logger import setup_logger

from selcon_plugin.engine.console import ShortOutput
from selcon_plugin.engine.progress import protect_bars_from
from selcon_plugin.io.atomic import make_folder

# FastReID's loggers whose lines are shown on the terminal.
_SHOWN = (
    "fastreid.engine.train_loop",
    "fastreid.evaluation.testing",
    "fastreid.utils.checkpoint",
)
_FORMAT = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"  # FastReID's own
_MOST_KEPT = 100_000  # lines
_handlers: list[logging.Handler] = []  # those of the last run in this process


class _LogFile(logging.handlers.MemoryHandler):
    """Log file that is opened when the run begins; until then its lines are kept."""

    def __init__(self) -> None:
        super().__init__(_MOST_KEPT, flushLevel=logging.CRITICAL + 1)

    def open(self, file: Path) -> None:
        """Open the file and write the kept lines.

        Args:
            file: File to append to.
        """
        make_folder(file.parent)
        target = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        target.setFormatter(logging.Formatter(_FORMAT, datefmt="%m/%d %H:%M:%S"))
        # On a full disk the run itself stops with an error, at its next checkpoint.
        target.handleError = lambda record: None  # type: ignore[method-assign]
        self.setTarget(target)
        self.capacity = 0
        self.flush()

    def close(self) -> None:
        target, self.target = self.target, None
        super().close()
        if target is not None:
            target.close()


def begin_log() -> None:
    """Set up FastReID's log for a run; :func:`open_log` begins its file.

    The handlers of an earlier run in this process are removed: its log file would receive
    the lines of this run as well.
    """
    log, ours = logging.getLogger("fastreid"), logging.getLogger("selcon_plugin")
    for handler in _handlers:
        log.removeHandler(handler)
        ours.removeHandler(handler)
        if isinstance(handler, _LogFile):
            handler.close()
    earlier = list(log.handlers)
    setup_logger.cache_clear()
    setup_logger(distributed_rank=comm.get_rank())
    log.addHandler(_LogFile())
    _handlers[:] = [handler for handler in log.handlers if handler not in earlier]
    for handler in _handlers:
        if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
            handler.addFilter(ShortOutput("fastreid", _SHOWN))


def open_log(folder: str) -> None:
    """Open the log file of a run, when nothing can be refused any more.

    Args:
        folder: Folder of the run.
    """
    for handler in _handlers:
        if isinstance(handler, _LogFile) and handler.target is None and folder:
            number = comm.get_rank()
            handler.open(Path(folder, "log.txt" + (f".rank{number}" if number else "")))


def log_setup(cfg: CfgNode, source: str) -> None:
    """Log and set up what FastReID's ``default_setup`` does, without its files.

    Args:
        cfg: Complete config.
        source: File of the config; empty for none.
    """
    log = logging.getLogger("fastreid")
    log.info("Rank of current process: %d. World size: %d", comm.get_rank(), _world())
    log.info("Environment info:\n%s", collect_env_info())
    if source:
        text = Path(source).read_text(encoding="utf-8")
        log.info("Contents of args.config_file=%s:\n%s", source, text)
    log.info("Running with full config:\n%s", cfg)
    seed_all_rng()


def _world() -> int:
    size: int = comm.get_world_size()
    return size


def share_host_log() -> None:
    """Add FastReID's log handlers to the logger of this package."""
    protect_bars_from("fastreid")
    ours = logging.getLogger("selcon_plugin")
    for handler in logging.getLogger("fastreid").handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
