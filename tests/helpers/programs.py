"""Programs in separate processes, as a shell starts them, without the cost of imports.

Importing torch, a host and numba takes about six seconds. A fork server
(:mod:`multiprocessing.forkserver`) imports them once. Each program is a fork of it with its
own output, working directory, environment, arguments and signals. Modules read the server's
environment when they are imported; only ``FASTREID_DATASETS`` is passed on. Tests of the
start itself (which modules are imported, what an import reads) use :mod:`subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]

_CONTEXT = multiprocessing.get_context("forkserver")


def environment(**changes: object) -> dict[str, str]:
    """Return this process's environment with the package and the helpers on the path."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, path))} | changes
    return os.environ | {name: str(value) for name, value in changes.items()}


class Program:
    """A running ``python ARGUMENTS``, with the interface of :class:`subprocess.Popen`."""

    def __init__(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        output: BinaryIO | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.args = list(map(str, arguments))
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self._files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        start_server()
        self._process = _CONTEXT.Process(
            target=_run,
            args=(
                self.args,
                dict(environment() if env is None else env),
                os.fspath(cwd or Path.cwd()),
                [_Inherited(output.fileno())] * 2 if output else self._files,
                [_Inherited(number) for number in pass_fds],
            ),
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, *self.output())
        return self.returncode

    def output(self) -> tuple[str, str]:
        """Return the text written so far to stdout and stderr."""
        out, err = (file.read_text() for file in self._files)
        return out, err

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.output()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_program(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Replace ``subprocess.run([sys.executable, *arguments], ...)`` with captured text."""
    program = Program(*arguments, env=env, cwd=cwd)
    try:
        output = program.communicate(timeout)
    finally:
        program.kill()
        program.wait()
    return subprocess.CompletedProcess(program.args, program.wait(), *output)


def popen(
    command: Sequence[str],
    *,
    stdin: int,
    stdout: BinaryIO,
    stderr: int,
    pass_fds: Sequence[int],
) -> Program:
    """Replace ``subprocess.Popen`` in the bench by a program of the fork server."""
    executable, *arguments = command
    assert executable == sys.executable
    assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
    return Program(*arguments, output=stdout, pass_fds=pass_fds)


class _Inherited:
    """A file descriptor that is duplicated into a program, where it is a number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_number, (reduction.DupFd(self._number),)


def _own_number(copy: Any) -> int:
    return copy.detach()


def start_server() -> None:
    _CONTEXT.set_forkserver_preload(["helpers.preloaded"])
    with mock.patch.dict(os.environ, environment()):
        multiprocessing.forkserver.ensure_running()


# --- in the process of the program --------------------------------------------------------


def _run(
    arguments: list[str],
    env: dict[str, str],
    cwd: str,
    outputs: list[Path | int],
    _inherited: list[int],
) -> None:
    """Run the program in this process, and exit as the interpreter would."""
    for number, output in enumerate(outputs, start=1):
        file = output if isinstance(output, int) else os.open(output, os.O_WRONLY)
        os.dup2(file, number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # the default, for its own children
    if "fastreid.data.build" in sys.modules:
        sys.modules["fastreid.data.build"]._root = env.get("FASTREID_DATASETS", "datasets")
    status = _status_of(arguments)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _status_of(arguments: list[str]) -> int:
    try:
        _execute(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        sys.stderr.write(f"{end.code}\n")
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _execute(arguments: list[str]) -> dict[str, Any]:
    from helpers import preloaded

    first, *others = arguments
    if first == "-m":
        sys.path[:] = [os.getcwd(), *preloaded.PATH]
        sys.argv[:] = others
        return runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    sys.path[:] = [str(Path(first).resolve().parent), *preloaded.PATH]
    sys.argv[:] = arguments
    return runpy.run_path(first, run_name="__main__")
