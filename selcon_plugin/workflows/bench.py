"""``selcon bench``: several configs on several seeds, in one table.

Each run is a process of its own, so that its peak memory is its own and its end does not
end the others. A bench that was stopped goes on where it stopped. What a table holds comes
from the ``results.json`` that ``selcon train`` writes: figures of the last epoch, never of
the one that happened to be best on the test set.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from selcon_plugin.cli.arguments import add_import_argument
from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.loading import import_files
from selcon_plugin.hosts import host_of
from selcon_plugin.workflows.bench_hosts import HOSTS, BenchHost, load_bench_config
from selcon_plugin.workflows.bench_table import (
    METRICS,
    Outcome,
    Report,
    Run,
    differences,
    write_file,
)

_RESULTS = "results.json"  # of `selcon train`: there when a run is finished
_SETTINGS = "bench.yaml"  # the effective config that a run was begun with
_CONSOLE = "console.txt"  # what a run printed
_LOCK = ".lock"

_POLL_SECONDS = 1.0
_STOP_SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench.

    Args:
        argv: Arguments after ``selcon bench``; those of the process by default.

    Returns:
        Exit status: 0, 1 if a run failed, or 130 (Ctrl-C) or 143 (SIGTERM) if the bench was
        stopped.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parse(arguments)
    import_files(args.imports)
    output = Path(args.output)
    runs = _plan(args, output)
    try:
        with _stopped_by_sigterm():
            outcomes = _work(runs, output, shlex.join(["selcon", "bench", *arguments]))
    except KeyboardInterrupt as stop:
        _say("\nStopped. The same command goes on where this one stopped.")
        return 143 if isinstance(stop, _Terminated) else 130
    return int(any(outcome.error for outcome in outcomes))


# --- what is to be done -------------------------------------------------------------------


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="selcon bench",
        description="Train and evaluate each config on each seed, and write a table "
        "(Markdown, CSV, JSON). A bench that was stopped goes on.",
    )
    parser.add_argument(
        "--configs", nargs="+", required=True, metavar="FILE.yml", help="configs"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1; default: 3"
    )
    parser.add_argument(
        "--dataset", default="", metavar="NAME", help="data to train and test all on"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs to train all for")
    parser.add_argument(
        "--output", default="logs/bench", metavar="FOLDER", help="default: logs/bench"
    )
    add_import_argument(parser)
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs=argparse.REMAINDER,
        help="config options, for all configs",
    )
    args = parser.parse_args(arguments)
    # Options that follow the files directly are read as files.
    files = list(itertools.takewhile(_is_config_file, args.configs))
    args.opts = args.configs[len(files) :] + args.opts
    args.configs = files
    for name in ("seeds", "epochs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be 1 or more, got {value}")
    if not files:
        raise ValueError(f"--configs needs .yml files, got {args.opts[0]!r}")
    run_keys = [key for host in HOSTS.values() for key in (host.output_key, host.seed_key)]
    for key in run_keys:
        if key in args.opts[::2]:
            raise ValueError(f"{key} is set by --output and --seeds: leave it out")
    return args


def _is_config_file(word: str) -> bool:
    return word.endswith((".yml", ".yaml"))


def row_names(files: Sequence[str]) -> list[str]:
    """Name configs by their files, with as many folders as it takes to tell them apart.

    Args:
        files: Paths.

    Returns:
        One name per file, for instance ``["scl", "a/mine", "b/mine"]``.

    Raises:
        ValueError: If a file is given twice.
    """
    paths = [Path(file).resolve() for file in files]
    for path, file in zip(paths, files, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"--configs: {file} is given twice")
    plain = [path.with_suffix("") for path in paths]
    parts = [
        (path if plain.count(short) > 1 else short).parts[1:]  # without the root
        for path, short in zip(paths, plain, strict=True)
    ]
    depths = [1] * len(paths)
    while True:
        names = ["/".join(p[-depth:]) for p, depth in zip(parts, depths, strict=True)]
        if len(set(names)) == len(names):
            return names
        depths = [
            depth + (names.count(name) > 1)
            for name, depth in zip(names, depths, strict=True)
        ]


def _plan(args: argparse.Namespace, output: Path) -> list[Run]:
    """Read all configs; write each run's settings into its folder, or compare them."""
    hosts = [HOSTS[host_of(file)] for file in args.configs]
    _check_options(args.opts, hosts)
    runs, texts = [], []
    for name, file, host in zip(row_names(args.configs), args.configs, hosts, strict=True):
        options = host.dataset_options(args.dataset) if args.dataset else []
        if args.epochs is not None:
            options += [host.epochs_key, str(args.epochs)]
        cfg = load_bench_config(file, [*options, *host.option_pairs(args.opts)])
        for seed in range(args.seeds):
            folder = output / name / f"seed{seed}"
            host.set_run(cfg, str(folder), seed)
            texts.append(cfg.dump())
            settings = flatten_config(yaml.safe_load(texts[-1]))
            runs.append(Run(name, seed, folder, settings, host.name, tuple(args.imports)))
    for run in runs:
        _check_folder(run)
    for run, text in zip(runs, texts, strict=True):
        run.folder.mkdir(parents=True, exist_ok=True)
        write_file(run.folder / _SETTINGS, text)
    # The first seed of all configs comes first: a comparison, early.
    return sorted(runs, key=lambda run: run.seed)


def _check_options(options: Sequence[str], hosts: Sequence[BenchHost]) -> None:
    used = {key for host in hosts for key in host.option_pairs(options)[::2]}
    for key in options[::2]:
        if key not in used:
            raise ValueError(f"{key} is a key of another host than that of the configs")


def _check_folder(run: Run) -> None:
    """Compare a run with the one that its folder holds, if any.

    Raises:
        ValueError: If it was begun with other settings, or by another command.
    """
    begun = (HOSTS[run.host].checkpoints, _RESULTS)
    if not any((run.folder / name).exists() for name in begun):
        return  # nothing to lose
    file = run.folder / _SETTINGS
    if not file.exists():
        raise ValueError(
            f"{run.folder} holds a run that is not the bench's: choose another --output"
        )
    earlier = flatten_config(yaml.safe_load(file.read_text()) or {})
    changed = differences({"earlier": earlier, "now": run.settings})
    if changed:
        named = ", ".join(
            f"{key}: {values['earlier']!r} then, {values['now']!r} now"
            for key, values in itertools.islice(changed.items(), 3)
        )
        more = ", ..." if len(changed) > 3 else ""
        raise ValueError(
            f"{run.folder} holds a run with other settings ({named}{more}): remove that "
            "folder to begin anew, or choose another --output"
        )


# --- the runs -----------------------------------------------------------------------------


def _work(runs: Sequence[Run], output: Path, command: str) -> list[Outcome]:
    """Finish all runs; rewrite the table after each."""
    num_seeds = max(run.seed for run in runs) + 1
    num_configs = len(runs) // num_seeds
    _say(f"Runs: {len(runs)}, into {output}")
    outcomes: list[Outcome] = []
    for number, run in enumerate(runs, start=1):
        outcomes.append(_finish(run, f"[{number}/{len(runs)}] {run}"))
        report = Report(outcomes, num_seeds, command)
        report.write(output)
        if number % num_configs == 0:  # a seed is complete
            _say(f"\n{report.table()}\n")
    _say("\n".join(report.notes()))
    _say(f"\nTable  {output / 'table.md'}, table.csv, table.json")
    return outcomes


def _finish(run: Run, title: str) -> Outcome:
    """Read a finished run, or train what is left of it."""
    started = time.monotonic()
    with _alone(run.folder, title) as lock:
        if (run.folder / _RESULTS).exists():
            when = "finished earlier"
        else:
            error = _train(run, title, lock)
            if error:
                _say(f"{title}: FAILED: {error}\n    see {run.folder / _CONSOLE}")
                return Outcome(run, error=error)
            when = f"in {_duration(time.monotonic() - started)}"
        record = _read_results(run.folder / _RESULTS)
    _say(f"{title}: {when}{_summary(record['metrics'])}")
    return Outcome(run, record)


def _read_results(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        record["metrics"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is not what a run writes: {error!r}. Remove it, and the run goes on "
            "from its last checkpoint"
        ) from error
    return record


def _command(run: Run) -> list[str]:
    """Return the command that trains and evaluates, or goes on with, a run."""
    # The copy, not the file that was given: it may be edited while the bench goes on.
    config = str(run.folder / _SETTINGS)
    return [
        *(sys.executable, "-m", "selcon_plugin", "train"),
        *("--resume", "--config-file", config),
        *(word for file in run.imports for word in ("--import", file)),
    ]


def _train(run: Run, title: str, lock: int) -> str:
    """Train in a process of its own; return why it failed, or nothing."""
    host, console = HOSTS[run.host], run.folder / _CONSOLE
    log = run.folder / (host.log or _CONSOLE)
    log_start, console_start = _size(log), _size(console)
    epochs = run.settings[host.epochs_key]
    if not sys.stdout.isatty():
        _say(f"{title}: begins, prints into {console}")
    started = time.monotonic()
    with console.open("ab") as stream:
        process = subprocess.Popen(
            _command(run),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),  # held as long as the run lives, should the bench be killed
        )
    try:
        while process.poll() is None:
            elapsed = time.monotonic() - started
            state = progress(_tail(log, log_start), epochs, elapsed, host)
            _show(f"{title}: {state}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_POLL_SECONDS)
    finally:
        _stop(process)
    if process.returncode:
        return failure(process.returncode, _tail(console, console_start))
    if not (run.folder / _RESULTS).exists():
        return f"it ended without writing {_RESULTS}"
    return ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it still runs; it finishes a step and writes a checkpoint."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def progress(
    log: str, epochs: int, elapsed: float, host: BenchHost = HOSTS["fastreid"]
) -> str:
    """Say how far a run is.

    Args:
        log: End of the host's log.
        epochs: Epochs of the whole run.
        elapsed: Seconds since this part of the run began.
        host: The host.

    Returns:
        Epoch, time, and time left as the host estimates it.
    """
    found = list(host.progress.finditer(log))
    if not found:
        return f"{_duration(elapsed)}, starting"
    last = found[-1]
    text = (
        f"epoch {int(last['epoch']) + 1 - host.first_epoch}/{epochs}, {_duration(elapsed)}"
    )
    if last["time"] is None:
        return text
    hours, minutes, seconds = map(int, last["time"].split(":"))
    left = ((int(last["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return f"{text}, {_duration(left)} left"


def failure(status: int, console: str) -> str:
    """Say why a run ended.

    Args:
        status: Its exit status; below 0 for the signal that ended it.
        console: End of what it printed.

    Returns:
        One line.
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
    """Read the end of a file, of what was written after ``start``."""
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        stream.seek(max(start, _size(file) - 8192))
        return stream.read().decode(errors="replace")


@contextlib.contextmanager
def _alone(folder: Path, title: str) -> Iterator[int]:
    """Wait until no process trains in a folder, then keep others out.

    A bench that was killed leaves its last run going. The system frees the lock when both
    are gone.

    Yields:
        The lock's file descriptor.
    """
    import fcntl

    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"{title}: another process trains in {folder}, waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C."""


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that no run is left behind."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise _Terminated

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


# --- the terminal -------------------------------------------------------------------------


def _summary(metrics: Mapping[str, Mapping[str, float]]) -> str:
    return "".join(
        f"; {test_set}: "
        + ", ".join(f"{name} {found[name]:.1f} %" for name in METRICS if name in found)
        for test_set, found in metrics.items()
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _show(text: str) -> None:
    """Show a line on a terminal until the next one takes its place."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write(f"\r\x1b[K{text[:width]}")
        sys.stdout.flush()


def _say(text: str) -> None:
    _show("")
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
