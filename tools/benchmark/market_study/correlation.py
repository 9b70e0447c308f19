"""Correlation of label-free metrics with the validation mAP of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from selcon_plugin.engine.best_weights import SIGNS
from selcon_plugin.runs.metrics import read_metrics

LABEL_FREE = (
    *("silhouette", "stability", "num_clusters", "outlier_ratio", "eps"),
    *("mean_cluster_size", "median_cluster_size", "max_cluster_size"),
    *("largest_cluster_ratio", "embedding_variance", "effective_rank"),
    *("nearest_similarity", "total_loss"),
)
# For comparison: a run without labels cannot measure them.
WITH_IDENTITIES = ("ami", "purity", "pair_precision", "pair_recall", "neighbor_precision")

_MAP = "mAP"
_MIN_VALUES = 3


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a run with the metrics measured nearest to it.

    Attributes:
        mean_ap: Validation mAP.
        metrics: Metrics measured nearest to the evaluation, by name.
    """

    mean_ap: float
    metrics: Mapping[str, float]


def read_run(folder: Path, results: Mapping[str, Any]) -> list[Evaluation]:
    """Read the evaluations of a finished run, the last epoch's at the end.

    Args:
        folder: Folder of the run, with FastReID's ``metrics.json``.
        results: Content of its ``results.json``.

    Returns:
        One entry per evaluation. Clusters are measured before an epoch and evaluations
        after it, so the next epoch's clusters belong to the evaluated weights. The last
        evaluation has the clusters from the start of the last epoch.
    """
    lines = read_metrics(folder / "metrics.json")
    last = max(results["steps"] - 1, 0)
    evaluated = {int(line["iteration"]): line[_MAP] for line in lines if _MAP in line}
    (evaluated[last],) = {found[_MAP] for found in results["metrics"].values()}
    return [
        Evaluation(mean_ap, _metrics_near(lines, iteration))
        for iteration, mean_ap in sorted(evaluated.items())
    ]


def _metrics_near(lines: Sequence[Mapping[str, float]], iteration: int) -> dict[str, float]:
    metrics = {}
    for name in (*LABEL_FREE, *WITH_IDENTITIES):
        known = [line for line in lines if name in line]
        if known:
            # Ties go to the later one, which belongs to newer weights.
            nearest = min(
                known,
                key=lambda line: (abs(line["iteration"] - iteration), -line["iteration"]),
            )
            metrics[name] = float(nearest[name])
    return metrics


@dataclass(frozen=True)
class Row:
    """Spearman's rank correlation of one metric with validation mAP.

    Attributes:
        name: Name of the metric.
        across: Correlation over the last evaluations of the runs with the metric; None for
            fewer than 3.
        num_runs: Number of runs with the metric.
        within: Mean over runs of the correlation over the evaluations of a run.
        num_within: Number of runs with 3 or more evaluations with the metric.
        gain: Mean difference of validation mAP between the evaluation with the best value
            and the last one; None for metrics that are not a checkpoint criterion.
    """

    name: str
    across: float | None
    num_runs: int
    within: float | None
    num_within: int
    gain: float | None = None


def correlate(runs: Sequence[Sequence[Evaluation]]) -> list[Row]:
    """Correlate each metric with validation mAP.

    Args:
        runs: Evaluations of each run.

    Returns:
        One row per measured metric, label-free ones first; each kind is sorted by the
        strength of the correlation across runs.
    """
    rows = []
    for name in (*LABEL_FREE, *WITH_IDENTITIES):
        last = [run[-1] for run in runs if run and name in run[-1].metrics]
        if not last:
            continue
        within = [
            spearman([e.metrics[name] for e in known], [e.mean_ap for e in known])
            for run in runs
            if len(known := [e for e in run if name in e.metrics]) >= _MIN_VALUES
        ]
        defined = [value for value in within if value is not None]
        across = spearman([e.metrics[name] for e in last], [e.mean_ap for e in last])
        mean = statistics.fmean(defined) if defined else None
        gain = _gain(name, runs) if name in SIGNS else None
        rows.append(Row(name, across, len(last), mean, len(defined), gain))
    return sorted(
        rows, key=lambda row: (row.name in WITH_IDENTITIES, -abs(row.across or 0.0))
    )


def _gain(name: str, runs: Sequence[Sequence[Evaluation]]) -> float:
    """Compare the checkpoint that a metric would select with the last one."""
    gains = []
    for run in runs:
        known = [e for e in run if math.isfinite(e.metrics.get(name, math.nan))]
        if known:
            kept = max(known, key=lambda e: SIGNS[name] * e.metrics[name])
            gains.append(kept.mean_ap - run[-1].mean_ap)
    return statistics.fmean(gains)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Compute Spearman's rank correlation.

    Args:
        first: First values.
        second: Second values, of the same number.

    Returns:
        Correlation in [-1, 1], with ties at their mean rank; None for fewer than 3 values,
        or if either side is constant.

    Example:
        >>> round(spearman([1, 2, 3], [2, 4, 9]), 6)
        1.0
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if math.isfinite(a + b)]
    if len(pairs) < _MIN_VALUES:
        return None
    ranks = [rankdata(side) for side in zip(*pairs, strict=True)]
    if any(np.ptp(side) == 0 for side in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def table(rows: Sequence[Row], num_runs: int) -> str:
    """Format the rows as a Markdown table.

    Args:
        rows: Result of :func:`correlate`.
        num_runs: Number of runs.

    Returns:
        Table with a note.
    """
    lines = [
        "| metric | labels | across runs | runs | within a run | runs | kept - last |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        labels = "identities" if row.name in WITH_IDENTITIES else "none"
        lines.append(
            f"| `{row.name}` | {labels} | {_signed(row.across)} | {row.num_runs} | "
            f"{_signed(row.within)} | {row.num_within} | {_signed(row.gain)} |"
        )
    note = (
        f"Spearman's rank correlation with validation mAP over {num_runs} runs: across "
        "runs at their ends, and within a run over its evaluations (mean over runs). Last "
        "column: mAP of the evaluation with the best metric minus that of the last one."
    )
    return "\n".join([*lines, "", note, ""])


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
