"""File locks between processes, which the system releases when their holder ends."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

# What a file system without locks answers, for instance some network file systems.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def exclusive(
    path: Path, *, on_wait: Callable[[], object] | None = None
) -> Iterator[int | None]:
    """Hold a lock that the system releases when the process ends, however it ends.

    A second process waits until the first one is done.

    Args:
        path: File that stands for the lock; it exists only while the lock is held. Its
            folder is made if absent.
        on_wait: Called once before waiting for another process; by default the wait is
            logged, with the path.

    Yields:
        The file descriptor of the lock. A child process that inherits it holds the lock as
        well, should this process be killed. None if the file system has no locks: then
        processes may do the same work twice, and the caller must tolerate that.

    Raises:
        OSError: If the file cannot be opened, for instance in a read-only folder.
    """
    descriptors: list[int] = []
    # Without flock, filelock would fall back to a file that a killed process leaves behind.
    lock = FileLock(path, fallback_to_soft=False, on_acquired=descriptors.append)
    try:
        _acquire(lock, on_wait)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield None
        return
    try:
        yield descriptors[-1]
    finally:
        # Before the release: a process that waits for this very file sees that it is gone,
        # and locks the next one. Windows removes the file itself, after the release.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _acquire(lock: FileLock, on_wait: Callable[[], object] | None) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is None:
            logger.info("Another process holds %s: waiting until it ends", lock.lock_file)
        else:
            on_wait()
        lock.acquire()
