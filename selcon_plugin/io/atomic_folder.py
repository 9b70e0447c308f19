"""Fill a folder so that others see it complete or not at all."""

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_PARTIAL_SUFFIX = ".partial"


def publish_folder(
    folder: Path, fill: Callable[[Path], None], is_complete: Callable[[Path], bool]
) -> Path:
    """Return `folder`, filling it first if it is absent or incomplete.

    The content is written to a hidden sibling and renamed at the end. Processes that ask
    at the same time wait for the first one. What a killed process left behind is removed.
    An incomplete `folder` is replaced, so it must be one that only this function writes.

    Args:
        folder: The folder to have; its parents are created.
        fill: Writes the content into the empty folder it is given.
        is_complete: Tells whether an existing folder is finished and usable.

    Returns:
        `folder`.
    """
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    stem = folder.name.rsplit("-", 1)[0]
    with exclusive(folder.parent / f".{stem}.lock") as alone:
        if is_complete(folder):
            return folder
        if alone:
            _remove_partial_folders(folder.parent, stem)
        partial = folder.parent / f".{stem}-{uuid.uuid4().hex}{_PARTIAL_SUFFIX}"
        try:
            partial.mkdir()
            fill(partial)
            _move(partial, folder, is_complete)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _move(partial: Path, folder: Path, is_complete: Callable[[Path], bool]) -> None:
    """Rename `partial` to `folder`, putting away what is there and not complete."""
    if folder.exists() and not is_complete(folder):
        logger.warning("%s is incomplete and is written again", folder)
        broken = partial.with_name(f"{partial.stem}-replaced{_PARTIAL_SUFFIX}")
        folder.rename(broken)
        shutil.rmtree(broken)
    try:
        partial.rename(folder)
    except OSError:
        if not is_complete(folder):  # else another process was faster, without locks
            raise


def _remove_partial_folders(parent: Path, stem: str) -> None:
    """Remove what killed processes left; only for the holder of the lock."""
    for stale in parent.glob(f".{stem}-*{_PARTIAL_SUFFIX}"):
        logger.info("removing %s, left by an interrupted run", stale)
        shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock that the system frees when the process ends, however it ends.

    Args:
        path: File that stands for the lock; it is there while the lock is held.

    Yields:
        Whether the lock is held. It is not where the system or the file system has no
        such locks; then processes may do the same work twice, and the last rename loses.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            yield False
            return
        if _is_open_file(descriptor, path):
            break
        os.close(descriptor)  # the former holder removed this file: lock the new one
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_open_file(descriptor: int, path: Path) -> bool:
    """Tell whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
