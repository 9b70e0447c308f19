"""The table of ``selcon bench`` with its footnotes, as Markdown, CSV and JSON.

This module only formats the outcomes of runs; it starts none.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.io.tables import write_table
from selcon_plugin.workflows.bench_latex import latex_table

METRICS = ("mAP", "Rank-1", "Rank-5", "Rank-10", "mINP")
# Label of the reference that the host trains with identities.
SUPERVISED = "supervised"

# Settings that may change when a run is resumed, and that do not affect the result.
_FREE_KEYS = (
    *("OUTPUT_DIR", "DATALOADER.NUM_WORKERS"),
    *("SOLVER.CHECKPOINT_PERIOD", "MODEL.SELCON.KEEP_CHECKPOINTS"),
    "MODEL.SELCON.KEEP_BEST_BY",
    *("TEST.EVAL_PERIOD", "TEST.IMS_PER_BATCH", "TEST.EXPECTED_RESULTS"),
)
# Prefixes of the keys that must be equal for a fair comparison of methods. All other keys
# belong to the recipe of a method.
_BUDGET_KEYS = (
    *("MODEL.BACKBONE.", "MODEL.WEIGHTS", "MODEL.DEVICE", "INPUT.SIZE_", "DATASETS."),
    *("SOLVER.MAX_EPOCH", "SOLVER.IMS_PER_BATCH", "SOLVER.AMP."),
    *("TEST.", "MODEL.SELCON.TEST_CAMERA_TERM"),
)
_STEPS = "steps of training"
_HOST = "host"


@dataclass(frozen=True)
class Run:
    """A run of one config with one seed.

    Attributes:
        config: Name of the config in the table.
        seed: Seed of the run.
        folder: Output folder.
        settings: Effective values by full keys.
        host: Package of the host.
        imports: Python files that the run imports first.
        comparable: Settings under keys that all hosts share, as far as they exist; empty
            if ``settings`` uses these keys.
        backbone: Name of the backbone.
        input_size: Height and width of the input, as text.
        supervised: Whether the host trains its own baseline with identities.
    """

    config: str
    seed: int
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    host: str = ""
    imports: Sequence[str] = ()
    comparable: Mapping[str, Any] = field(default_factory=dict)
    backbone: str = ""
    input_size: str = ""
    supervised: bool = False

    def __str__(self) -> str:
        return f"{self.config} seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        run: The run.
        record: Content of its ``results.json``; None if the run failed.
        error: Reason of the failure; empty if there was none.
    """

    run: Run
    record: Mapping[str, Any] | None = None
    error: str = ""


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation (n - 1).

    Args:
        values: Any number of values.

    Returns:
        The mean, or None without values; the deviation, or None for fewer than two values.
    """
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def summarize(outcomes: Sequence[Outcome], num_seeds: int) -> list[dict[str, Any]]:
    """Aggregate runs over their seeds.

    Args:
        outcomes: Results of the runs so far.
        num_seeds: Number of runs of each config in the complete bench.

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
                "backbone": mine[0].run.backbone,
                "input_size": mine[0].run.input_size,
                "supervised": mine[0].run.supervised,
                "test_set": test_set,
                "seeds": num_seeds,
                "finished": len(records),
                "failed": sum(bool(outcome.error) for outcome in mine),
            }
            found = [r["metrics"][test_set] for r in records if test_set in r["metrics"]]
            measured = {
                name: [metrics[name] for metrics in found if name in metrics]
                for name in METRICS
            }
            measured["minutes"] = [r["train_seconds"] / 60 for r in records]
            measured["clusters"] = _known(records, "num_clusters")
            for name, values in measured.items():
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
        settings: Values by full key, for the name of each config.

    Returns:
        The values by name for each key that differs, sorted by key; keys that do not
        affect the result are left out.
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
    """Report whether the configs had the same budget, and the differences if not.

    Args:
        differing: Result of :func:`differences`, including the number of training steps.

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
    """The table of a bench with its footnotes.

    Attributes:
        outcomes: Results of the runs so far.
        num_seeds: Number of runs of each config in the complete bench.
        command: Command line that repeats the bench.
    """

    outcomes: Sequence[Outcome]
    num_seeds: int
    command: str

    def write(self, output: Path) -> None:
        """Write the tables into a folder, in Markdown, CSV, JSON and LaTeX."""
        rows = summarize(self.outcomes, self.num_seeds)
        notes = "\n".join(self.notes())
        tables = f"{self.table()}\n\n{self.seeds_table()}"
        write_atomically(f"{tables}\n\n{notes}\n", output / "table.md")
        write_atomically(self.latex(), output / "table.tex")
        write_table(output / "table.csv", list(rows[0]), (row.values() for row in rows))
        runs = self.seed_rows()
        write_table(output / "runs.csv", list(runs[0]), (row.values() for row in runs))
        content = {
            "command": self.command,
            "date": _now(),
            "rows": rows,
            "differences": self.differing(),
            "runs": [_run_as_json(outcome) for outcome in self.outcomes],
        }
        # Without a checksum, as it is for other programs: a later bench reads the results
        # of the runs.
        write_atomically(json.dumps(content, indent=2) + "\n", output / "table.json")

    def table(self) -> str:
        """Format the rows as a Markdown table that is readable on a terminal as well."""
        header = ("Config", "Method", "Backbone", "Input", "Test set", "Seeds", *METRICS)
        cells: list[tuple[str, ...]] = [(*header, "Minutes", "Memory (MiB)", "Clusters")]
        for row in summarize(self.outcomes, self.num_seeds):
            finished, seeds = row["finished"], row["seeds"]
            named = ("config", "method", "backbone", "input_size", "test_set")
            cells.append(
                (
                    *(row[name] or "-" for name in named),
                    str(seeds) if finished == seeds else f"{finished} of {seeds}",
                    *(_mean_and_spread(row, name, 1) for name in (*METRICS, "minutes")),
                    _memory(row),
                    _mean_and_spread(row, "clusters", 0),
                )
            )
        return _pipe_table(cells, num_texts=5)

    def seeds_table(self) -> str:
        """Format the metrics of each run as a Markdown table."""
        header = ("Config", "Test set", "Seed", *METRICS, "Minutes", "Clusters")
        cells: list[tuple[str, ...]] = [header]
        for row in self.seed_rows():
            values = [row[name] for name in (*METRICS, "minutes")]
            cells.append(
                (
                    *(row["config"], row["test_set"] or "-", str(row["seed"])),
                    *("-" if value is None else f"{value:.1f}" for value in values),
                    "-" if row["clusters"] is None else str(row["clusters"]),
                )
            )
        return _pipe_table(cells, num_texts=2)

    def seed_rows(self) -> list[dict[str, Any]]:
        """Return one row per run and test set, with its metrics in percent."""
        rows = []
        for outcome in self.outcomes:
            run, record = outcome.run, outcome.record or {}
            metrics = record.get("metrics") or {"": {}}
            for test_set, found in metrics.items():
                seconds = record.get("train_seconds")
                rows.append(
                    {
                        "config": run.config,
                        "method": record.get("method", ""),
                        "backbone": run.backbone,
                        "input_size": run.input_size,
                        "test_set": test_set,
                        "seed": run.seed,
                        **{name: found.get(name) for name in METRICS},
                        "minutes": None if seconds is None else seconds / 60,
                        "clusters": record.get("num_clusters"),
                        "error": outcome.error,
                    }
                )
        return rows

    def latex(self) -> str:
        """Format the rows as a table in LaTeX."""
        over = f"mean and sample standard deviation over {self.num_seeds} seeds"
        return latex_table(
            summarize(self.outcomes, self.num_seeds),
            metrics=METRICS,
            caption="Accuracy in percent after the last epoch"
            + (f", {over}." if self.num_seeds > 1 else ", one seed."),
            comments=[line.removeprefix("* ").replace("*", "") for line in self.notes()],
        )

    def notes(self) -> list[str]:
        """Return the footnotes in Markdown: how the metrics were measured, and failures."""
        over = f"mean ± sample standard deviation over seeds 0 to {self.num_seeds - 1}"
        lines = [
            f"* Metrics of the last epoch in percent; "
            f"{over if self.num_seeds > 1 else 'one run with seed 0'}.",
            "* Minutes: training time without evaluation. Memory: largest peak of the "
            "training process, or of the GPU memory if a GPU was used.",
        ]
        if any(outcome.run.supervised for outcome in self.outcomes):
            lines.append(
                "* Rows named supervised: the host's own baseline, trained with the true "
                "identities; all other rows use none."
            )
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
        if len(finished) < len(settings):  # not yet known for all configs
            for flat in finished:
                del flat[_STEPS]
        if len({flat[_HOST] for flat in settings.values()}) > 1:
            # Most keys of a host have no counterpart in the other.
            common = set.intersection(*(set(flat) for flat in settings.values()))
            settings = {
                name: {key: flat[key] for key in common} for name, flat in settings.items()
            }
        return differences(settings)


def _run_as_json(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    place = {"config": run.config, "seed": run.seed, "folder": str(run.folder)}
    return {**place, "error": outcome.error, **(outcome.record or {})}


def _mean_and_spread(row: Mapping[str, Any], name: str, digits: int) -> str:
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


def _pipe_table(cells: Sequence[Sequence[str]], *, num_texts: int) -> str:
    """Format a Markdown table; the columns after the texts are right-aligned."""
    cells = [[text.replace("|", "\\|") for text in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            text.ljust(width) if i < num_texts else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * w if i < num_texts else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def _machine(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    return f"{record['device']}; {versions}"


def _now() -> str:
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
