"""Atomic, durable writes: a file gets its name only when it is complete."""

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
    """Write a file such that a kill or a crash leaves the previous file intact.

    A symbolic or hard link of the name is replaced; its target is not written to.

    The content is on disk before the file gets its name, and the name is on disk before
    this returns, so a power failure loses neither.

    Args:
        file: File to write or replace.

    Yields:
        The stream to write to.
    """
    partial = f"{file}{_PARTIAL}"
    try:
        # A link of this name would let its target be overwritten.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        with open(partial, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        # On a full disk its space is needed.
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    _sync_folder(os.path.dirname(os.path.abspath(file)))


def save_atomically(data: Any, file: str | Path) -> None:
    """Save data like ``torch.save``, using :func:`replacing`.

    Args:
        data: Data to save.
        file: File to write or replace.
    """
    with replacing(file) as stream:
        torch.save(data, stream)


def write_atomically(text: str, file: str | Path) -> None:
    """Write a text file, using :func:`replacing`.

    Args:
        text: Text to write.
        file: File to write or replace.
    """
    with replacing(file) as stream:
        stream.write(text.encode())


def remove_partial_files(folder: str | Path) -> None:
    """Remove partial files left by killed processes.

    No other process may be writing in the folder.

    Args:
        folder: Folder of a run; may be missing.
    """
    for file in Path(folder).glob(f"*{_PARTIAL}"):
        if file.is_file() or file.is_symlink():
            file.unlink(missing_ok=True)


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # not every file system supports this
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
