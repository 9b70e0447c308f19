"""Atomic, durable writes: a file gets its name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

_PARTIAL = ".partial"
_REMEDY = "Choose another place, or make this one writable"
_FULL = "Free some space on that disk, or choose another place, and repeat the command"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EINVAL: "Choose the name of a file",
    errno.EISDIR: "It is a folder: choose another name, or move the folder",
    errno.ENOTDIR: "Part of its path is a file: choose another place, or move that file",
    errno.EEXIST: "A file has this name: choose another name, or move the file",
    errno.ENOENT: "Its folder does not exist, or was removed: create it again",
}


class FileWriteError(OSError):
    """Error for a file or folder that cannot be written, with reason and remedy.

    Args:
        file: The file that was to be written.
        cause: Error of the system.
        what: What was tried.
    """

    def __init__(self, file: str | Path, cause: OSError, what: str = "write") -> None:
        # NumPy's own error of a short write has no number.
        number = cause.errno or errno.ENOSPC
        reason = cause.strerror or str(cause) or os.strerror(number)
        if "requested and" in reason:
            reason = os.strerror(number)
        reason = f"{reason}. {_REMEDIES.get(number, _REMEDY)}"
        super().__init__(number, reason, str(file))
        self._text = f"cannot {what} {file}: {reason}"

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> Any:  # to pass from one process to another
        return OSError, (self.errno, self._text)


def named_write_error(error: OSError, place: str | Path) -> OSError:
    """Return an error with the name of its file, such as one of a host's own writers.

    Args:
        error: Error of the system; returned unchanged if it has a name.
        place: Folder or file that was written.
    """
    return error if error.filename else FileWriteError(place, error, "write to")


class _Stream(io.BufferedWriter):
    """File that remembers a failed write, which ``torch.save`` reports as another error."""

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failure = error
            raise


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

    Raises:
        FileWriteError: If the file cannot be written, for instance on a full disk; the
            message names the file and a remedy, and the previous file is intact.
    """  # noqa: DOC502  (raised by the functions called here)
    partial = f"{file}{_PARTIAL}"
    with _named_errors(file, partial) as streams:
        _refuse_device(file)
        try:
            # A link of this name would let its target be overwritten.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            with _Stream(io.FileIO(partial, "x")) as stream:
                streams.append(stream)
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


def _refuse_device(file: str | Path) -> None:
    """Refuse /dev/stdout and the like, which an administrator's rename would replace."""
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return
    is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    if not is_file or os.path.dirname(os.path.abspath(file)) in ("/dev", "/dev/fd"):
        raise FileWriteError(file, OSError(errno.EINVAL, "It is a device or a pipe"))


@contextlib.contextmanager
def _named_errors(file: str | Path, partial: str) -> Iterator[list[_Stream]]:
    """Raise errors of the file system with the name of the file."""
    streams: list[_Stream] = []
    try:
        yield streams
    except Exception as error:
        failure = streams[0].failure if streams else None
        if failure is None and isinstance(error, OSError):
            # An error with another name is of another file, which was read meanwhile.
            failure = error if error.filename in (None, partial) else None
        if failure is None or isinstance(error, FileWriteError):
            raise
        raise FileWriteError(file, failure) from error


def make_folder(folder: str | Path) -> Path:
    """Create a folder for output, with its parents, unless it exists.

    Args:
        folder: The folder.

    Returns:
        The folder.

    Raises:
        FileWriteError: If it cannot be created, for instance where a file has its name.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileWriteError(folder, error, "create the folder") from error
    return Path(folder)


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
