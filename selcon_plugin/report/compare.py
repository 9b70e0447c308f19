"""The page that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selcon_plugin.report.charts import UNKNOWN, Chart, Series, line_chart
from selcon_plugin.report.collect import RunData
from selcon_plugin.report.curves import drawn, epoch_label
from selcon_plugin.report.document import Section, Table, render_page
from selcon_plugin.report.notes import find_notes
from selcon_plugin.report.page import changed_settings, headline

# Metrics plotted for all runs: title, unit, factor.
_CURVES: dict[str, tuple[str, str, float]] = {
    "total_loss": ("Loss", "", 1.0),
    "mAP": ("mAP on the test set", "%", 1.0),
    "num_clusters": ("Clusters", "", 1.0),
    "outlier_ratio": ("Outliers (images in no cluster)", "%", 100.0),
    "silhouette": ("Silhouette of the clusters", "", 1.0),
    "ami": ("Agreement of the clusters with the identities (AMI)", "", 1.0),
    "lr": ("Learning rate", "", 1.0),
}
# These keys differ between any two runs and do not describe the training.
_IGNORED_KEYS = ("OUTPUT_DIR", "data.save_dir")


def comparison_page(runs: Sequence[RunData]) -> str:
    """Build a page that compares runs.

    Args:
        runs: Two or more runs.

    Returns:
        A complete HTML document; it shows no crops.
    """
    names = run_names([run.folder for run in runs])
    sections = [
        Section("summary", "Metrics", _metrics(runs, names)),
        Section("curves", "Training", _curves(runs, names)),
        Section("settings", "Differences between the configs", _differences(runs, names)),
        Section("notes", "Warnings", _warnings(runs, names)),
    ]
    return render_page(
        "compare.html.j2",
        title="Comparison of runs",
        heading=f"{len(runs)} runs compared",
        subtitle=", ".join(names),
        sections=sections,
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as many parents as unique names require.

    Args:
        folders: Folders of the runs, all different.

    Returns:
        A name per run.

    Example:
        >>> run_names([Path("/logs/a/seed0"), Path("/logs/b/seed0")])
        ['a/seed0', 'b/seed0']
    """
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names


def _metrics(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    metrics = [dict(headline(run)) for run in runs]
    columns = list(dict.fromkeys(key for found in metrics for key in found))
    rows = [
        [name, *(found.get(column, UNKNOWN) for column in columns)]
        for name, found in zip(names, metrics, strict=True)
    ]
    return Table(["Run", *columns], rows)


def _curves(runs: Sequence[RunData], names: Sequence[str]) -> list[Chart]:
    charts = []
    labels = {epoch_label(run) for run in runs}
    x_label = (
        labels.pop() if len(labels) == 1 else "epochs (unfinished runs: steps) trained"
    )
    for key, (title, unit, factor) in _CURVES.items():
        lines = [
            Series(
                name,
                run.curve(key).epochs,
                [factor * value for value in run.curve(key).values],
            )
            for run, name in zip(runs, names, strict=True)
        ]
        charts.append(line_chart(lines, title=title, x_label=x_label, y_label=unit))
    return drawn(charts)


def _differences(runs: Sequence[RunData], names: Sequence[str]) -> Table | str:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))

    def value(run: RunData, key: str) -> Any:
        return run.settings.get(key, UNKNOWN)

    rows = []
    for key in keys:
        values = [str(value(run, key)) for run in runs]
        if len(set(values)) > 1 and key not in _IGNORED_KEYS:
            own = [changed_settings(run) or {} for run in runs]
            marks = ["" if key in found else " (default)" for found in own]
            known = [run.defaults is not None and key in run.settings for run in runs]
            rows.append(
                [key]
                + [
                    text + (mark if told else "")
                    for text, mark, told in zip(values, marks, known, strict=True)
                ]
            )
    if not any(run.settings for run in runs):
        return ""
    return (
        Table(["Key", *names], rows)
        if rows
        else "The configs differ only in the output folder."
    )


def _warnings(runs: Sequence[RunData], names: Sequence[str]) -> Table | str:
    rows = [
        [name, note.text]
        for run, name in zip(runs, names, strict=True)
        for note in find_notes(run)
        if note.level == "warning"
    ]
    return Table(["Run", "Warning"], rows) if rows else "There are no warnings."
