"""Short output on the terminal; details and the host's dumps go to the log file only."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from torch import Tensor, nn

from selcon_plugin.distributed import rank

logger = logging.getLogger(__name__)

# Set by --verbose; an environment variable, because a run's other processes inherit it.
VERBOSE = "SELCON_VERBOSE"
# Loggers of this package with details of each clustering.
_DETAILS = ("selcon_plugin.clustering.knn", "selcon_plugin.clustering.jaccard")


def is_verbose() -> bool:
    """Return whether all lines of the log are shown on the terminal."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


@contextlib.contextmanager
def verbose_output(verbose: bool) -> Iterator[None]:
    """Show all lines of the log on the terminal, in this process and in those it starts.

    Args:
        verbose: False leaves the output as it is.

    Yields:
        Nothing.
    """
    earlier = os.environ.get(VERBOSE)
    if verbose:
        os.environ[VERBOSE] = "1"
    try:
        yield
    finally:
        if verbose:
            os.environ[VERBOSE] = earlier or ""


class ShortOutput(logging.Filter):
    """Filter of a terminal's handler: it hides details, but no warning.

    Args:
        host: Package of the host, whose lines are hidden; "" to hide none.
        shown: Its loggers that are shown.
    """

    def __init__(self, host: str = "", shown: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._host, self._shown = host, shown

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown on the terminal."""
        if record.levelno >= logging.WARNING or is_verbose():
            return True
        of_host = bool(self._host) and record.name.partition(".")[0] == self._host
        return record.name in self._shown if of_host else record.name not in _DETAILS


def log_summary(method: str, labeler: str, network: nn.Module, camera_ids: Tensor) -> None:
    """Log one line about a run that begins: method, data and network.

    Args:
        method: Name of the method.
        labeler: Name of the labeler; empty for a method without clusters.
        network: Network to train.
        camera_ids: Camera of each training image, int64 ``(M,)``; -1 if it is unknown.
    """
    if rank() > 0:
        return
    num_cameras = len({camera for camera in camera_ids.tolist() if camera >= 0})
    parameters = list(network.parameters())
    size = sum(parameter.numel() for parameter in parameters) / 1e6
    device = parameters[0].device if parameters else "cpu"
    clusters = f" with clusters of {labeler}" if labeler else ""
    cameras = f" of {num_cameras} cameras" if num_cameras else ", cameras unknown"
    logger.info(
        "Method: %s%s. Data: %d images%s. Network: %.1f M parameters on %s",
        *(method, clusters, len(camera_ids), cameras, size, device),
    )
