"""File locks between processes, which the system releases when their holder ends.

Two forms: :func:`owned_folder` is for an output that a whole command works on, and refuses
at once; :func:`exclusive` is for a short section, and waits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from selcon_plugin.io.atomic import FileWriteError, make_folder, write_atomically
from selcon_plugin.io.names import printable

__all__ = ["LOCK_NAMES", "InUseError", "Owner", "exclusive", "owned_file", "owned_folder"]

logger = logging.getLogger(__name__)

# What a file system without locks answers, for instance some network file systems.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

_LOCK, _OWNER = ".in_use.lock", ".in_use.json"
# The lock of a file system without flock: the file itself, with pid and host of its owner.
_SOFT_SUFFIX = ".soft"
# Files that exist in a folder while a process owns it.
LOCK_NAMES = (_LOCK, _OWNER, f"{_LOCK}{_SOFT_SUFFIX}")
# The owner refreshes its record at this interval, for processes on other hosts.
_BEAT_SECONDS = 10.0
# A record of another host that is not refreshed for this long belongs to an ended process.
_SILENT_SECONDS = 45.0


class InUseError(ValueError):
    """Error for an output that another process works on; the message names its owner."""


@dataclass(frozen=True)
class Owner:
    """Process that works on an output, as recorded beside it.

    Attributes:
        pid: Process id.
        host: Name of its machine.
        started: Local time at which it began to work on the output.
        command: Command line of the process.
    """

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    command: str = field(default_factory=lambda: _command_line())

    def __str__(self) -> str:
        started, command = printable(self.started), printable(self.command)
        return f"process {self.place}, since {started} ({command})"

    @property
    def place(self) -> str:
        """Process id and machine, as they are shown in messages."""
        # Anything may be in a record that was read: it is a file in a shared folder.
        return f"{printable(self.pid)} on {printable(self.host)}"


@contextlib.contextmanager
def owned_folder(folder: str | Path) -> Iterator[None]:
    """Own an output folder while a command works on it; a second process is refused.

    The lock ends with its process, however that ends. In a distributed run only the main
    process may take it. While a process owns the folder, :data:`LOCK_NAMES` exist in it.

    Args:
        folder: Output folder; it is created if it is missing.

    Yields:
        Nothing.

    Raises:
        InUseError: If another process owns the folder; the message names that process and
            the remedy.
        OSError: If the folder cannot be written.
    """  # noqa: DOC502  (raised by the functions called here)
    folder = make_folder(folder)
    with _owned(str(folder), folder / _LOCK, folder / _OWNER):
        yield


@contextlib.contextmanager
def owned_file(file: str | Path) -> Iterator[None]:
    """Own one output file while a command makes it; see :func:`owned_folder`.

    Args:
        file: Output file; its folder is created if it is missing.

    Yields:
        Nothing.

    Raises:
        InUseError: If another process makes the same file.
        OSError: If the folder cannot be written.
    """  # noqa: DOC502  (raised by the functions called here)
    file = Path(file)
    make_folder(file.parent)
    hidden = f".{file.name}"
    with _owned(
        str(file),
        file.with_name(f"{hidden}{_LOCK}"),
        file.with_name(f"{hidden}{_OWNER}"),
    ):
        yield


@contextlib.contextmanager
def _owned(output: str, lock_file: Path, record: Path) -> Iterator[None]:
    lock = _take(output, lock_file, record)
    try:
        _refuse_other_host(output, record)
        try:
            write_atomically(json.dumps(asdict(Owner())) + "\n", record)
            with _refreshed(record):
                yield
        finally:
            with contextlib.suppress(OSError):
                record.unlink()
    finally:
        _release(lock, lock_file)


def _take(output: str, lock_file: Path, record: Path) -> BaseFileLock:
    """Return the lock, held; refuse if another process holds it."""
    lock: BaseFileLock = FileLock(lock_file, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            with contextlib.suppress(OSError):
                lock_file.unlink()
            # One that a dead process of this host has left is taken over; one of another
            # host cannot be checked, and is refused.
            lock = SoftFileLock(f"{lock_file}{_SOFT_SUFFIX}")
            lock.acquire(timeout=1)  # it may need a second try to take over
    except Timeout:
        raise InUseError(
            _in_use(output, _read_owner(record), Path(lock.lock_file))
        ) from None
    except OSError as error:
        raise FileWriteError(output, error, "write to") from error
    return lock


def _refuse_other_host(output: str, record: Path) -> None:
    """Refuse if a process on another host refreshes the record although the lock is free.

    Some network file systems keep their locks within each host.

    Raises:
        InUseError: If the record is refreshed while this process watches it.
    """
    owner = _read_owner(record, wait=False)
    if owner is None or owner.host == socket.gethostname():
        return
    seen = _modified(record)
    logger.info(
        "%s was in use by %s: waiting up to %.0f s to see whether that process still runs",
        output,
        owner,
        _SILENT_SECONDS,
    )
    deadline = time.monotonic() + _SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _SILENT_SECONDS))
        now = _modified(record)
        if now is None:  # that process has just ended
            return
        if now != seen:
            raise InUseError(_in_use(output, owner, record))


def _modified(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


@contextlib.contextmanager
def _refreshed(record: Path) -> Iterator[None]:
    """Refresh the time of a file until the context ends."""
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(record)

    thread = threading.Thread(target=refresh, name="selcon-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _in_use(output: str, owner: Owner | None, file: Path) -> str:
    who = "another process" if owner is None else str(owner)
    remedy = "Wait until it has ended, stop it, or choose another output"
    here = owner is not None and owner.host == socket.gethostname()
    if not here and (owner is not None or file.suffix == _SOFT_SUFFIX):
        remedy += f". If it has ended already, delete {file}"
    return f"{output} is in use by {who}. {remedy}"


def _read_owner(record: Path, *, wait: bool = True) -> Owner | None:
    """Read the record; None if there is none, or none that can be read."""
    for attempt in range(10):
        try:
            content: Any = json.loads(record.read_text(encoding="utf-8"))
            return Owner(**{name: content[name] for name in Owner.__dataclass_fields__})
        except (OSError, ValueError, TypeError, KeyError):
            # The owner writes it just after it has taken the lock.
            if not wait or attempt == 9:
                break
            time.sleep(0.1)
    return None


def _command_line() -> str:
    program, *arguments = sys.argv or ["python"]
    file = Path(program)
    name = file.parent.name if file.name == "__main__.py" else file.name
    return " ".join([name or "python", *arguments])[:120]


@contextlib.contextmanager
def exclusive(
    path: Path,
    *,
    on_wait: Callable[[], object] | None = None,
    timeout: float = -1,
) -> Iterator[int | None]:
    """Hold a lock that the system releases when the process ends, however it ends.

    A second process waits until the first one is done.

    Args:
        path: File that stands for the lock; it exists only while the lock is held. Its
            folder is made if absent.
        on_wait: Called once before waiting for another process; by default the wait is
            logged, with the path and the owner.
        timeout: Longest wait in seconds; negative to wait without end.

    Yields:
        The file descriptor of the lock. A child process that inherits it holds the lock as
        well, should this process be killed. None if the file system has no locks: then
        processes may do the same work twice, and the caller must tolerate that.

    Raises:
        InUseError: If another process holds the lock longer than ``timeout``.
        OSError: If the file cannot be opened, for instance in a read-only folder.
    """  # noqa: DOC502  (raised by the functions called here)
    descriptors: list[int] = []
    # Without flock, filelock would fall back to a file that a killed process leaves behind.
    lock = FileLock(path, fallback_to_soft=False, on_acquired=descriptors.append)
    try:
        _acquire(lock, path, on_wait, timeout)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield None
        return
    record = path.with_name(f"{path.name}.owner")
    try:
        with contextlib.suppress(OSError):
            write_atomically(json.dumps(asdict(Owner())) + "\n", record)
        yield descriptors[-1]
    finally:
        with contextlib.suppress(OSError):
            record.unlink()
        _release(lock, path)


def _release(lock: BaseFileLock, path: Path) -> None:
    # Before the release: a process that waits for this very file sees that it is gone, and
    # locks the next one. Windows, and a soft lock, remove the file themselves.
    if not isinstance(lock, SoftFileLock):
        with contextlib.suppress(OSError):
            path.unlink()
    lock.release()


def _acquire(
    lock: BaseFileLock, path: Path, on_wait: Callable[[], object] | None, timeout: float
) -> None:
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        owner = _read_owner(path.with_name(f"{path.name}.owner"))
    who = "Another process" if owner is None else f"Process {owner.place}"
    if on_wait is not None:
        on_wait()
    else:
        limit = f", for at most {timeout:.0f} s" if timeout >= 0 else ""
        logger.info("%s holds %s: waiting until it ends%s", who, path, limit)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise InUseError(
            f"{who} has held {path} for {timeout:.0f} s. Wait until it has ended, or stop "
            "it, and repeat the command"
        ) from None
