"""The report of one run as a self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selcon_plugin.engine.progress import duration
from selcon_plugin.report.charts import number
from selcon_plugin.report.collect import RunData
from selcon_plugin.report.crops import Crops
from selcon_plugin.report.curves import distances, training_charts
from selcon_plugin.report.document import Section, Table, render_page
from selcon_plugin.report.embedding_map import embedding_map
from selcon_plugin.report.galleries import (
    cluster_gallery,
    nearest_neighbors,
    ranked_results,
)
from selcon_plugin.report.notes import Note, find_notes

# Names of metrics that do not explain themselves.
_METRICS = {"metric": "Mean of mAP and Rank-1"}


@dataclass(frozen=True)
class Summary:
    """The headline metrics and the notes of a run.

    Attributes:
        metrics: Names and values.
        notes: Warnings and notes.
    """

    metrics: Sequence[tuple[str, str]]
    notes: Sequence[Note]


@dataclass(frozen=True)
class Settings:
    """The config of a run.

    Attributes:
        changed: Settings that differ from the defaults; None if there are none.
        defaults_known: Whether the defaults are known.
        full_title: Heading of the full config.
        full: Table of all settings.
    """

    changed: Table | None
    defaults_known: bool
    full_title: str
    full: Table


def run_page(run: RunData, *, images: bool = True) -> str:
    """Build the report of a run.

    Args:
        run: The run.
        images: Whether crops are shown.

    Returns:
        A complete HTML document.
    """
    crops = Crops(images)
    ranked = ranked_results(run, crops)
    about = list(_about(run))
    method = run.results.get("method") or run.setting("method") or "unknown method"
    return render_page(
        "run.html.j2",
        title=f"Report: {run.name}",
        heading=run.name,
        subtitle=f"{method} in {run.host}" if run.host else str(method),
        sections=[
            Section("summary", "Summary", Summary(headline(run), find_notes(run))),
            Section("curves", "Training", training_charts(run)),
            Section("map", "Map of the images", embedding_map(run, crops)),
            Section("clusters", "Clusters", cluster_gallery(run, crops)),
            Section("distances", "Distances", distances(run)),
            Section("ranked", "Ranked results", ranked)
            if ranked
            else Section("ranked", "Nearest neighbors", nearest_neighbors(run, crops)),
            Section("settings", "Settings", _settings(run)),
            Section("about", "About this run", Table(["Property", "Value"], about)),
        ],
    )


def headline(run: RunData) -> list[tuple[str, str]]:
    """List the main metrics of a run.

    Args:
        run: The run.

    Returns:
        Names and formatted values.
    """
    found: list[tuple[str, str]] = []
    several = len(run.metrics) > 1
    for name, metrics in run.metrics.items():
        for metric in ("mAP", "Rank-1", "Rank-5", "Rank-10", "mINP"):
            if isinstance(metrics.get(metric), (int, float)):
                label = f"{metric}, {name}" if several else metric
                found.append((label, f"{metrics[metric]:.1f} %"))
    clusters = run.curve("num_clusters").last
    outliers = run.curve("outlier_ratio").last
    if clusters is not None:
        found.append(("Clusters", number(clusters)))
    if outliers is not None:
        found.append(("Outliers", f"{100 * outliers:.0f} %"))
    if run.images is not None:
        cameras = len(np.unique(run.images.camids[run.images.camids >= 0]))
        found.append(("Images", number(len(run.images.paths))))
        found.append(("Cameras", number(cameras) if cameras else "unknown"))
    elif "num_images" in run.results:
        found.append(("Images", number(run.results["num_images"])))
    if "epochs" in run.results:
        found.append(("Epochs", number(run.results["epochs"])))
    if "train_seconds" in run.results:
        found.append(("Training time", duration(run.results["train_seconds"])))
    return found


def changed_settings(run: RunData) -> dict[str, tuple[Any, Any]] | None:
    """Compare a run's config with the defaults.

    Args:
        run: The run.

    Returns:
        Value and default of the keys that differ; None if the defaults are unknown.
    """
    if run.defaults is None:
        return None
    return {
        key: (value, run.defaults.get(key))
        for key, value in run.settings.items()
        if key not in run.defaults or run.defaults[key] != value
    }


def _settings(run: RunData) -> Settings | None:
    if not run.settings:
        return None
    changed = changed_settings(run)
    rows = [
        [key, str(value), str(default)] for key, (value, default) in (changed or {}).items()
    ]
    full = [
        [key, str(value), "changed" if changed and key in changed else ""]
        for key, value in run.settings.items()
    ]
    return Settings(
        Table(["Key", "Value", "Default"], rows) if rows else None,
        changed is not None,
        f"The full config ({len(full)} keys)",
        Table(["Key", "Value", "Mark"], full),
    )


def _about(run: RunData) -> Iterator[list[str]]:
    results = run.results
    yield ["Folder", str(run.folder.resolve())]
    for key, name in (
        ("method", "Method"),
        ("seed", "Seed"),
        ("steps", "Steps"),
        ("num_processes", "Processes"),
        ("device", "Device"),
    ):
        if results.get(key) is not None:
            yield [name, str(results[key])]
    yield from _costs(run)
    versions = results.get("versions")
    if isinstance(versions, Mapping):
        for name, value in versions.items():
            yield [f"{name} version", str(value)]
    for name, metrics in run.metrics.items():
        for metric, value in metrics.items():
            if isinstance(value, (int, float)):
                label = _METRICS.get(metric, metric)
                yield [f"{label}, {name}", f"{value:.2f} %"]


def _costs(run: RunData) -> Iterator[list[str]]:
    if "train_seconds" in run.results:
        yield ["Training, without evaluation", duration(run.results["train_seconds"])]
    for key, name in (
        ("extraction_seconds", "Feature extraction, in total"),
        ("clustering_seconds", "Clustering, in total"),
    ):
        if run.curve(key).values:
            yield [name, duration(sum(run.curve(key).values))]
    for key, name in (
        ("peak_memory_mib", "Peak memory"),
        ("peak_gpu_memory_mib", "Peak GPU memory"),
    ):
        if run.results.get(key):
            yield [name, f"{run.results[key]:,.0f} MiB"]
