"""The warnings and notes at the top of a report."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from selcon_plugin.clustering import labeler_names, labeler_options
from selcon_plugin.clustering.remedies import fewer_outliers, more_clusters
from selcon_plugin.engine.best_weights import BEST_FILE, NO_BETTER_REMEDY
from selcon_plugin.metrics.collapse import find_collapse_signs
from selcon_plugin.report.collect import RunData, cameras_of_clusters
from selcon_plugin.runs.results import RESULTS_FILE

_QUALITY = "cosine_silhouette"
_MANY_OUTLIERS = 0.5
_MANY_ONE_CAMERA_CLUSTERS = 0.5
_FEW_LOSSES = 4


@dataclass(frozen=True)
class Note:
    """A warning or a note about a run.

    Attributes:
        level: ``"warning"`` if the result is doubtful, ``"info"`` otherwise.
        text: The finding.
        remedy: Recommended action; may be empty.
    """

    level: Literal["warning", "info"]
    text: str
    remedy: str = ""


def find_notes(run: RunData) -> list[Note]:
    """Find signs of a failed run, and records that its report lacks.

    Args:
        run: The run.

    Returns:
        The warnings, followed by the notes.
    """
    found = [*_cluster_notes(run), *_camera_notes(run), *_training_notes(run)]
    found += [*_image_notes(run), *_missing_record_notes(run)]
    return sorted(found, key=lambda note: note.level == "info")


def _cluster_notes(run: RunData) -> Iterator[Note]:
    clusters = run.curve("num_clusters").last
    outliers = run.curve("outlier_ratio").last
    if clusters is not None and clusters <= 1:
        what = "All images are in one cluster" if clusters else "No cluster was found"
        options = _labeler_options(run)
        change = more_clusters(options) if clusters else fewer_outliers(options)
        yield Note("warning", f"{what}.", f"For more clusters {change}.")
    if outliers is not None and outliers > _MANY_OUTLIERS:
        yield Note(
            "warning",
            f"{100 * outliers:.0f} % of the images are outliers (in no cluster).",
            f"For fewer outliers {fewer_outliers(_labeler_options(run))}. Many outliers "
            "are normal if there are few images per person.",
        )
    measured = {
        name: value
        for name in ("embedding_variance", "effective_rank", "largest_cluster_ratio")
        if (value := run.curve(name).last) is not None
    }
    if measured.get("largest_cluster_ratio") == 1 and clusters == 1:
        del measured["largest_cluster_ratio"]  # reported above
    signs = find_collapse_signs(measured, _num_images(run))
    if signs:
        text = str(signs)
        yield Note(
            "warning",
            f"The features look collapsed: {text}.",
            "Start from pretrained weights, lower the learning rate, or "
            f"{more_clusters(_labeler_options(run))}.",
        )


def _labeler_options(run: RunData) -> Collection[str]:
    """Return the options of the run's labeler; those of DBSCAN if it is unknown."""
    name = str(run.setting("clustering.labeler"))
    return labeler_options(name if name in labeler_names() else "DBSCAN")


def _num_images(run: RunData) -> int:
    return int(run.results.get("num_images", 0)) or (
        0 if run.images is None else len(run.images.paths)
    )


def _camera_notes(run: RunData) -> Iterator[Note]:
    record, images = run.embedding, run.images
    if record is None or images is None or not record.clustered:
        return
    cameras = images.camids[images.camids >= 0]
    if len(np.unique(cameras)) < 2:
        return
    ratio = float(np.mean(cameras_of_clusters(record.labels, images.camids) == 1))
    if ratio > _MANY_ONE_CAMERA_CLUSTERS:
        yield Note(
            "warning",
            f"{100 * ratio:.0f} % of the clusters contain images of one camera only: the "
            "features may discriminate cameras rather than persons.",
            "Use a method with camera proxies (CAP, O2CAP), drop such clusters "
            f"(DROP_SINGLE_CAMERA), or {fewer_outliers(_labeler_options(run))}.",
        )


def _training_notes(run: RunData) -> Iterator[Note]:
    losses = _comparable_losses(run)
    if len(losses) >= _FEW_LOSSES:
        third = max(1, len(losses) // 3)
        first, last = float(np.mean(losses[:third])), float(np.mean(losses[-third:]))
        if last >= first:
            yield Note(
                "warning",
                f"The loss did not decrease: {first:.3g} at the start, {last:.3g} at the "
                "end.",
                "Lower the learning rate.",
            )
    yield from _verdict_notes(run)
    skipped = run.curve("skipped_steps").last
    if skipped:
        yield Note(
            "warning",
            f"{skipped:.0f} steps were skipped because of non-finite values.",
            "The log lists the images and the weights.",
        )


def _verdict_notes(run: RunData) -> Iterator[Note]:
    """Compare with the network before training, where the run compares with it."""
    quality = run.curve(_QUALITY)
    if run.setting("keep_best_by") != _QUALITY or len(quality.values) < 2:
        return
    untrained, best = quality.values[0], max(quality.values[1:])
    if best <= untrained:
        yield Note(
            "warning",
            "The training has not made the clusters of these images clearer: "
            f"{_QUALITY} {untrained:.3f} before training, at most {best:.3f} afterwards.",
            f"The network before training is kept as {BEST_FILE}. {NO_BETTER_REMEDY}.",
        )


def _comparable_losses(run: RunData) -> list[float]:
    """Return the losses after the warm-up, or nothing if the number of clusters grew.

    The loss of the warm-up is lower than the later one. A cluster loss grows with the
    number of clusters, regardless of the quality of the features.
    """
    clusters = run.curve("num_clusters").values
    if clusters and clusters[-1] > clusters[0]:
        return []
    losses, warmup = run.curve("total_loss"), run.setting("warmup_epochs") or 0
    return [
        value
        for epoch, value in zip(losses.epochs, losses.values, strict=True)
        if epoch > warmup and math.isfinite(value)
    ]


def _image_notes(run: RunData) -> Iterator[Note]:
    if run.images is not None and run.images.num_left_out:
        yield Note(
            "warning",
            f"{run.images.num_left_out} image files could not be read and were left out.",
            "The log lists them.",
        )


def _missing_record_notes(run: RunData) -> Iterator[Note]:
    for text in run.broken:
        yield Note("warning", f"A record could not be read and is not shown: {text}.")
    if not run.results and not (run.folder / RESULTS_FILE).exists():
        yield Note(
            "info",
            "The run has not finished: the metrics are those measured so far.",
            "Resume it (selcon train --resume; in a script of torchreid engine.resume), "
            "then build the report again.",
        )
    elif run.results and not run.metrics:
        yield Note(
            "info",
            "The run has no test set: the ranking accuracy is unknown.",
            "Inspect the clusters and the nearest neighbors below."
            if run.embedding is not None and run.embedding.clustered
            else "Inspect the nearest neighbors below.",
        )
    if run.embedding is None:
        yield Note(
            "info",
            "The run has no record of its features: neither map nor clusters are shown.",
            "It is written with each clustering, or at the start without one; a run that "
            "ended before, or that an earlier version trained, has none.",
        )
