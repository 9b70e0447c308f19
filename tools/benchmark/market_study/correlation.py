"""Which label-free figure of a run tracks its validation mAP."""

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
# For comparison: no run without labels has them.
WITH_IDENTITIES = ("ami", "purity", "pair_precision", "pair_recall", "neighbor_precision")

_MAP = "mAP"
_FEWEST = 3


@dataclass(frozen=True)
class Evaluation:
    """A moment of a run at which validation mAP is known.

    Attributes:
        mean_ap: Validation mAP.
        figures: What was measured nearest to that moment, by name.
    """

    mean_ap: float
    figures: Mapping[str, float]


def read_run(folder: Path, results: Mapping[str, Any]) -> list[Evaluation]:
    """Read the evaluations of a finished run, the last epoch's at the end.

    Args:
        folder: Of the run, with FastReID's ``metrics.json``.
        results: Content of its ``results.json``.

    Returns:
        One per evaluation. Clusters are measured before an epoch, evaluations made after
        one: the next epoch's clusters are those of the evaluated weights. The last epoch
        has those it began with.
    """
    lines = read_metrics(folder / "metrics.json")
    last = max(results["steps"] - 1, 0)
    evaluated = {int(line["iteration"]): line[_MAP] for line in lines if _MAP in line}
    (evaluated[last],) = {found[_MAP] for found in results["metrics"].values()}
    return [
        Evaluation(mean_ap, _figures_near(lines, iteration))
        for iteration, mean_ap in sorted(evaluated.items())
    ]


def _figures_near(lines: Sequence[Mapping[str, float]], iteration: int) -> dict[str, float]:
    figures = {}
    for name in (*LABEL_FREE, *WITH_IDENTITIES):
        known = [line for line in lines if name in line]
        if known:
            # Of two as near, the later: it is of newer weights.
            nearest = min(
                known,
                key=lambda line: (abs(line["iteration"] - iteration), -line["iteration"]),
            )
            figures[name] = float(nearest[name])
    return figures


@dataclass(frozen=True)
class Row:
    """How one figure tracks validation mAP, by Spearman's rank correlation.

    Attributes:
        name: Of the figure.
        across: Over the last evaluations of the runs that have it; None for fewer than 3.
        num_runs: How many have it.
        within: Mean over runs of that over a run's own evaluations.
        num_within: How many runs have 3 or more evaluations with it.
        gain: Mean validation mAP of the evaluation at which it was best, less that of the
            last; None for figures that weights are not kept by.
    """

    name: str
    across: float | None
    num_runs: int
    within: float | None
    num_within: int
    gain: float | None = None


def correlate(runs: Sequence[Sequence[Evaluation]]) -> list[Row]:
    """Correlate each figure with validation mAP.

    Args:
        runs: Evaluations of each run.

    Returns:
        A row for each figure that any run has, label-free ones first; each kind by the
        strength across runs.
    """
    rows = []
    for name in (*LABEL_FREE, *WITH_IDENTITIES):
        last = [run[-1] for run in runs if run and name in run[-1].figures]
        if not last:
            continue
        within = [
            spearman([e.figures[name] for e in known], [e.mean_ap for e in known])
            for run in runs
            if len(known := [e for e in run if name in e.figures]) >= _FEWEST
        ]
        defined = [value for value in within if value is not None]
        across = spearman([e.figures[name] for e in last], [e.mean_ap for e in last])
        mean = statistics.fmean(defined) if defined else None
        gain = _gain(name, runs) if name in SIGNS else None
        rows.append(Row(name, across, len(last), mean, len(defined), gain))
    return sorted(
        rows, key=lambda row: (row.name in WITH_IDENTITIES, -abs(row.across or 0.0))
    )


def _gain(name: str, runs: Sequence[Sequence[Evaluation]]) -> float:
    """Compare the weights that a figure would keep with the last ones."""
    gains = []
    for run in runs:
        known = [e for e in run if math.isfinite(e.figures.get(name, math.nan))]
        if known:
            kept = max(known, key=lambda e: SIGNS[name] * e.figures[name])
            gains.append(kept.mean_ap - run[-1].mean_ap)
    return statistics.fmean(gains)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation.

    Args:
        first: Values.
        second: As many.

    Returns:
        In [-1, 1], ties at their mean rank; None for fewer than 3 values, or where one side
        is constant.

    Example:
        >>> round(spearman([1, 2, 3], [2, 4, 9]), 6)
        1.0
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if math.isfinite(a + b)]
    if len(pairs) < _FEWEST:
        return None
    ranks = [rankdata(side) for side in zip(*pairs, strict=True)]
    if any(np.ptp(side) == 0 for side in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def table(rows: Sequence[Row], num_runs: int) -> str:
    """Lay out the rows in Markdown.

    Args:
        rows: What :func:`correlate` returned.
        num_runs: Runs that were read.

    Returns:
        Table and a note.
    """
    lines = [
        "| figure | labels | across runs | runs | within a run | runs | kept - last |",
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
        "column: mAP of the evaluation at which the figure was best, less the last's."
    )
    return "\n".join([*lines, "", note, ""])


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
