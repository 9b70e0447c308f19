"""``selcon bench``: compare several configs over several seeds in one table.

An interrupted bench resumes. The table is built from the ``results.json`` of each run. It
contains the metrics of the last epoch, never those of the epoch with the best test score.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.host import Host
from selcon_plugin.config.loading import Merger, pairs_of
from selcon_plugin.hosts import get_host, host_of, quiet_import
from selcon_plugin.io.atomic import make_folder, write_atomically
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.io.plain_yaml import read_settings
from selcon_plugin.runs.folder import owned_run
from selcon_plugin.runs.results import RESULTS_FILE
from selcon_plugin.workflows.bench_runs import SETTINGS_FILE, finish
from selcon_plugin.workflows.bench_table import (
    SUPERVISED,
    Outcome,
    Report,
    Run,
    differences,
)
from selcon_plugin.workflows.terminal import echo

__all__ = ["BenchTerminated", "plan", "row_names", "run_bench"]


def run_bench(
    configs: Sequence[str],
    output: str | Path,
    *,
    seeds: int = 3,
    dataset: str = "",
    epochs: int | None = None,
    options: Sequence[str] = (),
    imports: Sequence[str] = (),
    supervised: bool = False,
    command: str = "",
) -> list[Outcome]:
    """Train and evaluate each config with each seed, and write a table.

    Args:
        configs: Config files of any host.
        output: Folder for the runs and the table, in Markdown, CSV, JSON and LaTeX.
        seeds: Number of seeds; they are 0 to ``seeds`` - 1.
        dataset: Data set for training and test in all configs; empty for that of each
            config.
        epochs: Epochs to train in all configs; None for those of each config.
        options: ``KEY VALUE`` pairs, which apply to the configs of the host with this key.
        imports: Python files that each run imports first.
        supervised: Whether to train each host's own baseline with identities as well, with
            the network and the budget of the host's first config.
        command: Command line that repeats the bench, for the table.

    Returns:
        The metrics of each run, or the reason of its failure.

    Raises:
        ValueError: If a config or an option is wrong, or the folder contains other runs.
        KeyboardInterrupt: On Ctrl-C, and as ``BenchTerminated`` on SIGTERM; no run keeps
            running.
    """  # noqa: DOC502  (raised by the functions called here)
    for name, value in (("--seeds", seeds), ("--epochs", epochs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    output = Path(check_output_folder("--output", str(output)))
    # An interrupted bench leaves its last run, which the next bench waits for.
    with owned_run(output), _interrupted_by_sigterm():
        runs = plan(
            configs,
            output,
            seeds=seeds,
            dataset=dataset,
            epochs=epochs,
            options=options,
            imports=imports,
            supervised=supervised,
        )
        return _work(runs, output, command)


def plan(
    configs: Sequence[str],
    output: Path,
    *,
    seeds: int,
    dataset: str = "",
    epochs: int | None = None,
    options: Sequence[str] = (),
    imports: Sequence[str] = (),
    supervised: bool = False,
) -> list[Run]:
    """Read all configs, and write the settings of each run or compare them.

    Args:
        configs: As for :func:`run_bench`, like all other arguments.
        output: As for :func:`run_bench`.
        seeds: As for :func:`run_bench`.
        dataset: As for :func:`run_bench`.
        epochs: As for :func:`run_bench`.
        options: As for :func:`run_bench`.
        imports: As for :func:`run_bench`.
        supervised: As for :func:`run_bench`.

    Returns:
        The runs, sorted by seed, so that a first comparison of all configs is early.
    """
    with quiet_import():
        hosts = [get_host(host_of(file, "--configs")) for file in configs]
    _check_options(options, hosts)
    rows: list[tuple[str, Path, Host, Any]] = []
    for name, file, host in zip(row_names(configs), configs, hosts, strict=True):
        overrides = host.overrides(dataset=dataset, epochs=epochs)
        cfg = _load_config(host, file, _options_of(host, options), overrides)
        rows.append((name, output / name, host, cfg))
    if supervised:
        rows += _references(rows, output)
    runs, texts = [], []
    for name, folder, host, cfg in rows:
        for seed in range(seeds):
            place = host.overrides(output=str(folder / f"seed{seed}"), seed=seed)
            Merger(cfg, host.keys).merge_overrides(place)
            texts.append(cfg.dump())
            settings = flatten_config(yaml.safe_load(texts[-1]))
            backbone, size = host.describe_network(settings)
            runs.append(
                Run(
                    name,
                    seed,
                    folder / f"seed{seed}",
                    settings,
                    host.name,
                    tuple(imports),
                    host.comparable_settings(settings),
                    backbone,
                    size,
                    name.startswith(SUPERVISED),
                )
            )
    for run in runs:
        _check_folder(run)
    for run, text in zip(runs, texts, strict=True):
        make_folder(run.folder)
        write_atomically(text, run.folder / SETTINGS_FILE)
    return sorted(runs, key=lambda run: run.seed)


def _references(
    rows: Sequence[tuple[str, Path, Host, Any]], output: Path
) -> list[tuple[str, Path, Host, Any]]:
    """Return a supervised reference for the first config of each host."""
    first: dict[str, tuple[Host, Any]] = {}
    for _, _, host, cfg in rows:
        first.setdefault(host.name, (host, cfg))
    return [
        (
            f"{SUPERVISED} ({host.title})",
            output / f"{SUPERVISED}-{name}",
            host,
            host.supervised_config(cfg),
        )
        for name, (host, cfg) in first.items()
    ]


def _load_config(
    host: Host, file: str, options: Sequence[str], overrides: dict[str, Any]
) -> Any:
    """Read a config, and check that it can be trained before any run starts."""
    with quiet_import():
        cfg = host.load_config(file, options, overrides=overrides)
        try:
            host.check_trainable(cfg)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    cfg.defrost()
    return cfg


def row_names(files: Sequence[str]) -> list[str]:
    """Name configs by their files, with as many parent folders as unique names require.

    Args:
        files: Paths of the configs.

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


def _options_of(host: Host, options: Sequence[str]) -> list[str]:
    """Select the ``KEY VALUE`` pairs of a host; a key without a value stays last."""
    pairs = (list(options[start : start + 2]) for start in range(0, len(options), 2))
    return [word for pair in pairs if host.owns(pair[:1]) for word in pair]


def _check_options(options: Sequence[str], hosts: Sequence[Host]) -> None:
    for key, _ in pairs_of(options):
        owners = [host for host in hosts if host.owns([key])]
        if not owners:
            raise ValueError(
                f"{key} is a key of another host than that of the configs, or of no host"
            )
        if any(key in host.overrides(output="", seed=0) for host in owners):
            raise ValueError(f"{key} is set by --output and --seeds: leave it out")


def _check_folder(run: Run) -> None:
    """Compare a run with the earlier run in its folder, if there is one.

    Raises:
        ValueError: If the earlier run had other settings, or another command started it.
    """
    started = (get_host(run.host).run_files.begun, RESULTS_FILE)
    if not any((run.folder / name).exists() for name in started):
        return  # there is no earlier run
    file = run.folder / SETTINGS_FILE
    if not file.exists():
        raise ValueError(
            f"{run.folder} contains a run that the bench did not start: choose another "
            "--output"
        )
    earlier = flatten_config(read_settings(file))
    changed = differences({"earlier": earlier, "now": run.settings})
    if changed:
        named = ", ".join(
            f"{key}: {values['earlier']!r} then, {values['now']!r} now"
            for key, values in itertools.islice(changed.items(), 3)
        )
        more = ", ..." if len(changed) > 3 else ""
        raise ValueError(
            f"{run.folder} contains a run with other settings ({named}{more}): remove that "
            "folder to start over, or choose another --output"
        )


def _work(runs: Sequence[Run], output: Path, command: str) -> list[Outcome]:
    """Finish all runs, and rewrite the table after each of them."""
    num_seeds = max(run.seed for run in runs) + 1
    num_configs = len(runs) // num_seeds
    echo(f"{len(runs)} runs in {output}")
    outcomes: list[Outcome] = []
    for number, run in enumerate(runs, start=1):
        outcomes.append(finish(run, f"[{number}/{len(runs)}] {run}"))
        report = Report(outcomes, num_seeds, command)
        report.write(output)
        if number % num_configs == 0:  # a seed is complete
            echo(f"\n{report.table()}\n")
    echo("\n".join(report.notes()))
    echo(f"\nTable  {output / 'table.md'}, table.csv, table.json, table.tex, runs.csv")
    return outcomes


class BenchTerminated(KeyboardInterrupt):
    """Interruption of the bench by SIGTERM."""


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that no run keeps running."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise BenchTerminated

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
