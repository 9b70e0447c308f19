"""Messages and exit statuses of a command that fails or is interrupted.

A mistake of the user is one line with its remedy and the exit status 2. A fault of the
program is a traceback, followed by a line on how to report it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import pickle
import sys
import traceback
import zipfile
from collections.abc import Callable

from selcon_plugin.io.errors import ResourceError
from selcon_plugin.io.names import printable

# Errors in arguments, configs, data and files. A message names the remedy, which a
# traceback would hide. SELCON_TRACEBACK=1 shows where the error was raised.
USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    EOFError,
    MemoryError,
    ResourceError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
MISTAKE, FAULT, CLOSED_PIPE = 2, 1, 141  # exit statuses; 141 is that of SIGPIPE


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run a command, and turn whatever it raises into lines and an exit status.

    Args:
        name: Name of the command, for the lines.
        command: The command; it returns its exit status.

    Returns:
        The exit status: that of the command; 2 for a mistake of the user, 1 for a fault of
        the program; 130 after Ctrl-C; 141 if the reader of the output has gone.

    Raises:
        Exception: If SELCON_TRACEBACK is set, any error is raised instead.
    """  # noqa: DOC502  (raised again)
    title = f"selcon {name}" if name else "selcon"
    _prepare_output()
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as with `| head`
        _drop_output()
        return CLOSED_PIPE
    except KeyboardInterrupt:
        _write(f"{title}: interrupted")
        return 130
    except SystemExit as end:
        return _status_of(end)
    except Exception as error:
        if os.environ.get("SELCON_TRACEBACK"):
            raise
        return _report(title, error)


def _status_of(end: SystemExit) -> int:
    """Return the status of --help, of a stopped run, or of a program that exits itself."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    _write(str(end.code))
    return FAULT


def _report(title: str, error: Exception) -> int:
    if isinstance(error, USER_ERRORS):
        _write(f"{title}: error: {message_of(error)}")
        _drop_output_if_full()
        return MISTAKE
    _write("".join(traceback.format_exception(error)).rstrip(), one_line=False)
    if title == "selcon run":  # a fault of the script, or of the host in it
        _write(f"{title}: the script failed: {type(error).__name__}: {message_of(error)}")
        return FAULT
    _write(
        f"{title}: this is a fault of selcon_plugin ({type(error).__name__}). Please "
        "report the lines above, together with the output of selcon doctor"
    )
    return FAULT


def message_of(error: BaseException) -> str:
    """Return the message of an error in one line of printable characters."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ImportError):
        files = [str(name) for name in (error.filename, error.filename2) if name]
        text = f"{' -> '.join(files)}: {error.strerror}" if files else error.strerror
    elif isinstance(error, MemoryError):
        text = "the memory of this machine does not suffice: lower the batch size"
    else:
        text = str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and text == f"No module named {error.name!r}":
        text += ": install its package, or name the folder that holds it in PYTHONPATH"
    return printable(" ".join(line.strip() for line in text.splitlines()))


def _prepare_output() -> None:
    """Make the streams safe to write to: present, and able to show any file name."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")
    # A log line that cannot be written, since the terminal has gone, must not end a run.
    logging.raiseExceptions = False


def _write(text: str, *, one_line: bool = True) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{printable(text) if one_line else text}\n")
        sys.stderr.flush()


def _drop_output_if_full() -> None:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _drop_output()


def _drop_output() -> None:
    """Direct the output elsewhere, or Python would complain about it at its end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def imported_command(module: str, function: str, argv: list[str]) -> Callable[[], int]:
    """Return a command that is imported when it runs, so that the others are fast.

    Args:
        module: Module of ``selcon_plugin.cli``.
        function: Function that takes the arguments and returns the exit status.
        argv: Arguments.
    """

    def command() -> int:
        found = importlib.import_module(f"selcon_plugin.cli.{module}")
        status: int = getattr(found, function)(argv)
        return status

    return command
