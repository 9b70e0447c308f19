"""The runs of a bench, each in a separate process that is monitored until it ends.

Separate processes keep the peak memory of the runs apart, and a crash ends one run only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selcon_plugin.config.host_data import RunFiles
from selcon_plugin.engine.progress import duration
from selcon_plugin.hosts import get_host
from selcon_plugin.io.integrity import DamagedFileError
from selcon_plugin.io.locks import exclusive
from selcon_plugin.io.streams import is_terminal
from selcon_plugin.runs import results as runs_results
from selcon_plugin.runs.results import RESULTS_FILE
from selcon_plugin.workflows.bench_table import METRICS, Outcome, Run
from selcon_plugin.workflows.terminal import echo, show_status

__all__ = ["SETTINGS_FILE", "failure", "finish", "progress", "read_results"]

SETTINGS_FILE = "bench.yaml"  # the effective config that a run was started with
_CONSOLE = "console.txt"  # output of a run
_LOCK = ".lock"

_POLL_SECONDS = 1.0
_STOP_SECONDS = 60.0


def finish(run: Run, title: str) -> Outcome:
    """Read the results of a finished run, or train the remaining epochs first.

    Args:
        run: The run, whose folder contains its settings.
        title: Name of the run in messages.

    Returns:
        The metrics of the run, or the reason of its failure.

    Raises:
        DamagedFileError: If ``results.json`` is damaged.
    """  # noqa: DOC502  (raised by the functions called here)
    started = time.monotonic()
    # The last run of a killed bench keeps running. The system releases the lock when both
    # have ended.
    waiting = f"{title}: another process trains in {run.folder}, waiting for it"
    with exclusive(run.folder / _LOCK, on_wait=lambda: echo(waiting)) as lock:
        if (run.folder / RESULTS_FILE).exists():
            when = "finished earlier"
        else:
            error = _train(run, title, lock)
            if error:
                echo(f"{title}: FAILED: {error}\n    see {run.folder / _CONSOLE}")
                return Outcome(run, error=error)
            when = f"in {duration(time.monotonic() - started)}"
        record = read_results(run.folder / RESULTS_FILE)
    echo(f"{title}: {when}{_summary(record['metrics'])}")
    return Outcome(run, record)


def read_results(file: Path) -> dict[str, Any]:
    """Read the results of a finished run.

    Args:
        file: ``results.json`` of the run.

    Returns:
        Content of the file.

    Raises:
        DamagedFileError: If it is damaged; the message names file and remedy.
    """
    record = runs_results.read_results(file)
    if "metrics" not in record:
        raise DamagedFileError(
            f"{file} is damaged: it has no metrics. {runs_results.REMEDY}"
        )
    return record


def _command(run: Run) -> list[str]:
    """Return the command that trains and evaluates a run, or resumes it."""
    # The given file may be edited while the bench runs, so the run reads a copy.
    config = str(run.folder / SETTINGS_FILE)
    if run.supervised:
        module = "selcon_plugin.workflows.supervised"
        return [sys.executable, "-m", module, config, *run.imports]
    return [
        *(sys.executable, "-m", "selcon_plugin", "train"),
        *("--resume", "--config-file", config),
        *(word for file in run.imports for word in ("--import", file)),
    ]


def _train(run: Run, title: str, lock: int | None) -> str:
    """Train in a separate process; return the reason of a failure, or an empty string."""
    host, console = get_host(run.host), run.folder / _CONSOLE
    log = run.folder / (host.run_files.log or _CONSOLE)
    log_start, console_start = _size(log), _size(console)
    epochs = run.settings[host.run_keys.epochs]
    if not is_terminal(sys.stdout):
        echo(f"{title}: started, output in {console}")
    started = time.monotonic()
    with console.open("ab") as stream:
        process = subprocess.Popen(
            _command(run),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            # The run holds the lock until it ends, even if the bench is killed. Windows
            # passes no descriptors, and its processes share no locks.
            pass_fds=() if lock is None or os.name != "posix" else (lock,),
        )
    try:
        while process.poll() is None:
            elapsed = time.monotonic() - started
            state = progress(_tail(log, log_start), epochs, elapsed, host.run_files)
            show_status(f"{title}: {state}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_POLL_SECONDS)
    finally:
        _stop(process)
    if process.returncode:
        return failure(process.returncode, _tail(console, console_start))
    if not (run.folder / RESULTS_FILE).exists():
        return f"it ended without writing {RESULTS_FILE}"
    return ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process if it is running; it finishes its step and writes a checkpoint."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def progress(log: str, epochs: int, elapsed: float, files: RunFiles) -> str:
    """Describe the progress of a run.

    Args:
        log: End of the host's log.
        epochs: Epochs of the whole run.
        elapsed: Seconds since the process started.
        files: The host's files and the format of its log.

    Returns:
        Epoch, elapsed time, and the host's estimate of the remaining time.
    """
    found = list(files.progress.finditer(log))
    if not found:
        return f"{duration(elapsed)}, starting"
    last = found[-1]
    text = (
        f"epoch {int(last['epoch']) + 1 - files.first_epoch}/{epochs}, {duration(elapsed)}"
    )
    if last["time"] is None:
        return text
    hours, minutes, seconds = map(int, last["time"].split(":"))
    left = ((int(last["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return f"{text}, {duration(left)} left"


def failure(status: int, console: str) -> str:
    """Describe the reason of a failure.

    Args:
        status: Exit status of the process; negative for the signal that ended it.
        console: End of its output.

    Returns:
        Description in one line.
    """
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    lines = [line.strip() for line in console.splitlines() if line.strip()]
    return f"exit status {status}: {lines[-1] if lines else 'it printed nothing'}"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _tail(file: Path, start: int) -> str:
    """Return the last 8 KiB of a file, without the part before ``start``."""
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        stream.seek(max(start, _size(file) - 8192))
        return stream.read().decode(errors="replace")


def _summary(metrics: Mapping[str, Mapping[str, float]]) -> str:
    return "".join(
        f"; {test_set}: "
        + ", ".join(f"{name} {found[name]:.1f} %" for name in METRICS if name in found)
        for test_set, found in metrics.items()
    )
