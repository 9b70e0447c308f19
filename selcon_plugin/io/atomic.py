"""Files that appear under their name only when they are complete, and stay."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

_PARTIAL = ".partial"


@contextlib.contextmanager
def replacing(file: str | Path) -> Iterator[IO[bytes]]:
    """Write a file such that a kill or a crash at any moment leaves an earlier one intact.

    The bytes are on the disk before the file gets its name, and the name is before this
    returns: a machine that loses power loses neither.

    Args:
        file: The file to write or replace.

    Yields:
        The stream to write to.
    """
    partial = f"{file}{_PARTIAL}"
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        # On a full disk its room is needed.
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    _sync_folder(os.path.dirname(os.path.abspath(file)))


def save_atomically(data: Any, file: str | Path) -> None:
    """Save as ``torch.save`` does, by way of :func:`replacing`.

    Args:
        data: What to save.
        file: The file to write or replace.
    """
    with replacing(file) as stream:
        torch.save(data, stream)


def write_atomically(text: str, file: str | Path) -> None:
    """Write a text, by way of :func:`replacing`.

    Args:
        text: What to write.
        file: The file to write or replace.
    """
    with replacing(file) as stream:
        stream.write(text.encode())


def remove_partial_files(folder: str | Path) -> None:
    """Remove what a kill left half written; no other process may be writing there.

    Args:
        folder: Folder of a run; may be missing.
    """
    for file in Path(folder).glob(f"*{_PARTIAL}"):
        if file.is_file():
            file.unlink(missing_ok=True)


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # not every system and file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
