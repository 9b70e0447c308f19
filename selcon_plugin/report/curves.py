"""Charts of a run: metrics over the epochs, and histograms of pairwise distances."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from selcon_plugin.report.charts import Chart, Series, line_chart, number
from selcon_plugin.report.collect import RunData
from selcon_plugin.runs.embedding import (
    OTHER_CAMERA,
    SAME_CAMERA,
    SAME_CLUSTER,
    UNKNOWN_CAMERA,
)


class _MetricChart(NamedTuple):
    """A chart of one or more metrics; ``lines`` maps their keys to names in the legend."""

    title: str
    lines: dict[str, str]
    unit: str = ""
    factor: float = 1.0
    from_zero: bool = True


_CHARTS = (
    _MetricChart("Learning rate", {"lr": "learning rate"}),
    _MetricChart("Clusters", {"num_clusters": "clusters"}),
    _MetricChart(
        "Outliers (images in no cluster)", {"outlier_ratio": "outliers"}, "%", 100.0
    ),
    _MetricChart(
        "Label-free quality of the clusters",
        {"silhouette": "silhouette", "stability": "agreement with the previous epoch"},
        from_zero=False,
    ),
    _MetricChart(
        "Agreement of the clusters with the identities",
        {"ami": "adjusted mutual information", "purity": "purity"},
    ),
    _MetricChart(
        "Precision of the selected neighbors",
        {"neighbor_precision": "neighbor precision"},
        "%",
        100.0,
    ),
    _MetricChart("Effective rank of the features", {"effective_rank": "effective rank"}),
)


def training_charts(run: RunData) -> list[Chart]:
    """Draw the metrics that were measured during training.

    Args:
        run: The run.

    Returns:
        Charts of the loss, the accuracy and the other metrics.
    """
    x_label = epoch_label(run)
    charts = [
        line_chart(_loss_series(run), title="Loss", x_label=x_label),
        line_chart(
            _accuracy_series(run),
            title="Accuracy on the test set",
            x_label=x_label,
            y_label="%",
        ),
    ]
    for measured in _CHARTS:
        lines = [
            Series(text, curve.epochs, [measured.factor * value for value in curve.values])
            for name, text in measured.lines.items()
            if (curve := run.curve(name)).values
        ]
        chart = line_chart(
            lines,
            title=measured.title,
            x_label=x_label,
            y_label=measured.unit,
            from_zero=measured.from_zero,
        )
        charts.append(chart)
    return drawn(charts)


def drawn(charts: Iterable[Chart | None]) -> list[Chart]:
    """Return the charts that have data."""
    return [chart for chart in charts if chart is not None]


def epoch_label(run: RunData) -> str:
    """Return the label of the horizontal axis of a run's curves."""
    known = run.results.get("steps") and run.results.get("epochs")
    return "epochs trained" if known else "steps trained"


def _loss_series(run: RunData) -> list[Series]:
    """Return the total loss over the epochs, followed by its terms if there are several."""
    names = sorted(n for n in run.curves if n.startswith("loss") and n != "loss_scale")
    lines = [("total_loss", "total")] if "total_loss" in run.curves else []
    if len(names) > 1:
        lines += [(name, name.removeprefix("loss_").replace("_", " ")) for name in names]
    return [Series(text, run.curve(n).epochs, run.curve(n).values) for n, text in lines]


def _accuracy_series(run: RunData) -> list[Series]:
    """Return mAP and Rank-1 of each test set over the epochs."""
    return [
        Series(name, curve.epochs, curve.values)
        for name, curve in run.curves.items()
        if name.split("/")[-1] in ("mAP", "Rank-1")
    ]


@dataclass(frozen=True)
class Distances:
    """Histograms of the pairwise distances of training images.

    Attributes:
        chart: The histograms.
        reach: Largest distance that was computed, as text; empty if there is no limit.
        of_clusters: Whether there are pairs of the same cluster.
        of_cameras: Whether there are pairs from the same and from different cameras.
        has_eps: Whether the clustering has a distance within which images are neighbors.
    """

    chart: Chart
    reach: str
    of_clusters: bool
    of_cameras: bool
    has_eps: bool


def distances(run: RunData) -> Distances | None:
    """Draw histograms of the pairwise distances of images, by kind of pair.

    Args:
        run: The run.

    Returns:
        The chart; None if no distances were recorded.
    """
    record = run.embedding
    if record is None or not record.counts.any():
        return None
    names = {
        SAME_CAMERA: "same camera",
        OTHER_CAMERA: "different cameras",
        UNKNOWN_CAMERA: "unknown cameras",
        SAME_CLUSTER: "same cluster",
    }
    left = record.edges[:-1].tolist()
    lines = []
    for row, name in names.items():
        total = int(record.counts[row].sum())
        if total:
            percentages = (100.0 * record.counts[row] / total).tolist()
            lines.append(Series(f"{name} ({number(total)} pairs)", left, percentages))
    rule = (record.eps, f"eps {number(record.eps)}") if math.isfinite(record.eps) else None
    chart = line_chart(
        lines,
        title=f"Pairwise {record.distance} distance of images",
        x_label=f"{record.distance} distance",
        y_label="% of the pairs of each line",
        steps=True,
        rule=rule,
        from_zero=True,
    )
    if chart is None:
        return None
    # Jaccard distances are computed only for images with a common neighbor.
    is_jaccard = record.distance == "Jaccard"
    return Distances(
        chart,
        number(round(record.reach, 2)) if is_jaccard else "",
        of_clusters=record.clustered and bool(record.counts[SAME_CLUSTER].any()),
        of_cameras=all(record.counts[row].any() for row in (SAME_CAMERA, OTHER_CAMERA)),
        has_eps=rule is not None,
    )
