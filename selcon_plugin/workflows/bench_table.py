"""Table and footnotes of ``selcon bench``, in Markdown, CSV and JSON.

This module aggregates and formats the results of runs, and starts none.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selcon_plugin.io.atomic import write_atomically

METRICS = ("mAP", "Rank-1", "mINP")

# Settings that may differ between the parts of one run, and do not describe a method.
_FREE_KEYS = (
    *("OUTPUT_DIR", "DATALOADER.NUM_WORKERS"),
    *("SOLVER.CHECKPOINT_PERIOD", "MODEL.SELCON.KEEP_CHECKPOINTS"),
    "MODEL.SELCON.KEEP_BEST_BY",
    *("TEST.EVAL_PERIOD", "TEST.IMS_PER_BATCH", "TEST.EXPECTED_RESULTS"),
)
# Prefixes of the keys that must be equal for a fair comparison of methods. All other keys
# belong to a method's recipe.
_BUDGET_KEYS = (
    *("MODEL.BACKBONE.", "MODEL.WEIGHTS", "MODEL.DEVICE", "INPUT.SIZE_", "DATASETS."),
    *("SOLVER.MAX_EPOCH", "SOLVER.IMS_PER_BATCH", "SOLVER.AMP."),
    *("TEST.", "MODEL.SELCON.TEST_CAMERA_TERM"),
)
_STEPS = "steps of training"
_HOST = "host"


@dataclass(frozen=True)
class Run:
    """Run of one config on one seed.

    Attributes:
        config: Name of the config in the table.
        seed: Seed of the run.
        folder: Folder of the run.
        settings: Effective values by their full keys.
        host: Package of the host.
        imports: Python files that the run imports first.
        comparable: Settings by host-independent keys, as far as there are such; empty if
            ``settings`` already use them.
    """

    config: str
    seed: int
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    host: str = ""
    imports: Sequence[str] = ()
    comparable: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.config} seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        run: The run.
        record: Content of its ``results.json``; None if it failed.
        error: Reason of the failure.
    """

    run: Run
    record: Mapping[str, Any] | None = None
    error: str = ""


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation (n - 1).

    Args:
        values: Any number of values.

    Returns:
        The mean, None for no values, and the deviation, None for fewer than two values.
    """
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def summarize(outcomes: Sequence[Outcome], num_seeds: int) -> list[dict[str, Any]]:
    """Aggregate runs over their seeds.

    Args:
        outcomes: Results of the runs so far.
        num_seeds: Number of runs of each config when all are done.

    Returns:
        One row per config and test set, with ``X_mean`` and ``X_std`` over the finished
        runs for each metric (percent), ``minutes`` and ``clusters``, and the largest peak
        memory (MiB); unknown values are None.
    """
    rows = []
    for config in dict.fromkeys(outcome.run.config for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.run.config == config]
        records = [outcome.record for outcome in mine if outcome.record is not None]
        for test_set in dict.fromkeys(s for r in records for s in r["metrics"]) or [""]:
            row: dict[str, Any] = {
                "config": config,
                "method": records[0]["method"] if records else "",
                "test_set": test_set,
                "seeds": num_seeds,
                "finished": len(records),
                "failed": sum(bool(outcome.error) for outcome in mine),
            }
            found = [r["metrics"][test_set] for r in records if test_set in r["metrics"]]
            columns = {
                name: [metrics[name] for metrics in found if name in metrics]
                for name in METRICS
            }
            columns["minutes"] = [r["train_seconds"] / 60 for r in records]
            columns["clusters"] = _known(records, "num_clusters")
            for name, values in columns.items():
                row[f"{name}_mean"], row[f"{name}_std"] = mean_and_std(values)
            for name in ("peak_memory_mib", "peak_gpu_memory_mib"):
                row[name] = max(_known(records, name), default=None)
            rows.append(row)
    return rows


def _known(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records if record[name] is not None]


def differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compare effective configs.

    Args:
        settings: Values by full key, for each config name.

    Returns:
        Values by config name for each key that differs, sorted by key, without the keys
        that do not describe a method.
    """
    keys = sorted({key for values in settings.values() for key in values})
    result = {}
    for key in keys:
        values = {name: flat.get(key) for name, flat in settings.items()}
        first, *others = values.values()
        if key not in _FREE_KEYS and any(value != first for value in others):
            result[key] = values
    return result


def budget_notes(differing: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe whether the configs have the same budget, or which settings differ.

    Args:
        differing: Result of :func:`differences`, including the steps of training.

    Returns:
        Lines of Markdown.
    """
    unequal = {
        key: values
        for key, values in differing.items()
        if key in (_STEPS, _HOST) or key.startswith(_BUDGET_KEYS)
    }
    if not unequal:
        return [
            "* Same budget: host, backbone, input size, data, epochs, steps, batch size, "
            "device and test settings are equal."
        ]
    lines = ["* **The budgets differ:**"]
    for key, values in unequal.items():
        shown = ", ".join(f"{name} {value!r}" for name, value in values.items())
        lines.append(f"  * {key}: {shown}")
    return lines


@dataclass(frozen=True)
class Report:
    """Table with its footnotes.

    Attributes:
        outcomes: Results of the runs so far.
        num_seeds: Number of runs of each config when all are done.
        command: Command line that reproduces the table.
    """

    outcomes: Sequence[Outcome]
    num_seeds: int
    command: str

    def write(self, output: Path) -> None:
        """Write ``table.md``, ``table.csv`` and ``table.json`` into a folder."""
        rows = summarize(self.outcomes, self.num_seeds)
        notes = "\n".join(self.notes())
        write_atomically(f"{self.table()}\n\n{notes}\n", output / "table.md")
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(text.getvalue(), output / "table.csv")
        content = {
            "command": self.command,
            "date": _now(),
            "rows": rows,
            "differences": self.differing(),
            "runs": [_run_as_json(outcome) for outcome in self.outcomes],
        }
        write_atomically(json.dumps(content, indent=2) + "\n", output / "table.json")

    def table(self) -> str:
        """Format the rows in Markdown that is also readable on a terminal."""
        header = ("Config", "Method", "Test set", "Seeds", *METRICS)
        cells = [(*header, "Minutes", "Memory (MiB)", "Clusters")]
        for row in summarize(self.outcomes, self.num_seeds):
            finished, seeds = row["finished"], row["seeds"]
            cells.append(
                (
                    *(row["config"], row["method"] or "-", row["test_set"] or "-"),
                    str(seeds) if finished == seeds else f"{finished} of {seeds}",
                    *(_mean_std_text(row, name, 1) for name in (*METRICS, "minutes")),
                    _memory(row),
                    _mean_std_text(row, "clusters", 0),
                )
            )
        return _pipe_table(cells)

    def notes(self) -> list[str]:
        """Return footnotes in Markdown about the protocol, the budget and failures."""
        over = f"mean ± sample standard deviation over seeds 0 to {self.num_seeds - 1}"
        lines = [
            f"* Metrics are in percent, after the last epoch; "
            f"{over if self.num_seeds > 1 else 'one run with seed 0'}.",
            "* Minutes are the training time without evaluation. Memory is the largest "
            "peak of the training process, or of the GPU memory if a GPU was used.",
        ]
        if len({outcome.run.config for outcome in self.outcomes}) > 1:
            lines += budget_notes(self.differing())
        for outcome in self.outcomes:
            if outcome.error:
                lines.append(f"* **{outcome.run} failed:** {outcome.error}")
        machines = dict.fromkeys(
            _machine(outcome.record) for outcome in self.outcomes if outcome.record
        )
        lines += [f"* {machine}." for machine in machines]
        return [*lines, f"* {_now()}: `{self.command}`"]

    def differing(self) -> dict[str, dict[str, Any]]:
        """Compare the configs, and the numbers of steps of their finished runs."""
        settings: dict[str, dict[str, Any]] = {}
        for outcome in self.outcomes:
            run = outcome.run
            own = {**(run.comparable or run.settings), _HOST: run.host}
            first = settings.setdefault(run.config, own)
            if outcome.record is not None:
                first[_STEPS] = outcome.record["steps"]
        finished = [flat for flat in settings.values() if _STEPS in flat]
        if len(finished) < len(settings):  # not known for all configs yet
            for flat in finished:
                del flat[_STEPS]
        if len({flat[_HOST] for flat in settings.values()}) > 1:
            # Most keys of a host have no counterpart in another one.
            common = set.intersection(*(set(flat) for flat in settings.values()))
            settings = {
                name: {key: flat[key] for key in common} for name, flat in settings.items()
            }
        return differences(settings)


def _run_as_json(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    place = {"config": run.config, "seed": run.seed, "folder": str(run.folder)}
    return {**place, "error": outcome.error, **(outcome.record or {})}


def _mean_std_text(row: Mapping[str, Any], name: str, digits: int) -> str:
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    if mean is None:
        return "-"
    spread = "" if std is None else f" ± {std:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"


def _memory(row: Mapping[str, Any]) -> str:
    if row["peak_gpu_memory_mib"] is not None:
        return f"{row['peak_gpu_memory_mib']:.0f} (GPU)"
    peak = row["peak_memory_mib"]
    return "-" if peak is None else f"{peak:.0f}"


def _pipe_table(cells: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; from the fourth column on, cells are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            text.ljust(width) if i < 3 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * w if i < 3 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def _machine(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    return f"{record['device']}; {versions}"


def _now() -> str:
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
