"""Atomic creation of folders: other processes see a complete folder or none."""

import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from selcon_plugin.io.atomic import make_folder
from selcon_plugin.io.locks import exclusive

logger = logging.getLogger(__name__)

_PARTIAL_SUFFIX = ".partial"


def publish_folder(
    folder: Path, fill: Callable[[Path], None], is_complete: Callable[[Path], bool]
) -> Path:
    """Return `folder`, filling it first if it is missing or incomplete.

    The content is written to a hidden sibling, which is renamed at the end. Concurrent
    processes wait for the first one. Leftovers of killed processes are removed. An
    incomplete `folder` is replaced, so only this function may write it.

    Args:
        folder: Folder to create; its parents are created too.
        fill: Function that writes the content into the given empty folder.
        is_complete: Function that returns whether an existing folder is complete.

    Returns:
        `folder`.
    """
    if is_complete(folder):
        return folder
    make_folder(folder.parent)
    stem = folder.name.rsplit("-", 1)[0]
    with exclusive(folder.parent / f".{stem}.lock") as lock:
        if is_complete(folder):
            return folder
        if lock is not None:
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
    """Rename `partial` to `folder`, replacing an incomplete folder."""
    if folder.exists() and not is_complete(folder):
        logger.warning("%s is incomplete and is written again", folder)
        broken = partial.with_name(f"{partial.stem}-replaced{_PARTIAL_SUFFIX}")
        folder.rename(broken)
        shutil.rmtree(broken)
    try:
        partial.rename(folder)
    except OSError:
        if not is_complete(folder):  # without locks another process may be first
            raise


def _remove_partial_folders(parent: Path, stem: str) -> None:
    """Remove leftovers of killed processes; only the holder of the lock may call this."""
    for stale in parent.glob(f".{stem}-*{_PARTIAL_SUFFIX}"):
        logger.info("removing %s, left by an interrupted run", stale)
        shutil.rmtree(stale, ignore_errors=True)
