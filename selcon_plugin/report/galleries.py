"""Image galleries of a run: clusters, ranked results and nearest neighbors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selcon_plugin.datasets.numbering import camera_name
from selcon_plugin.report.charts import UNKNOWN, number
from selcon_plugin.report.collect import RunData, TrainingImages, cameras_of_clusters
from selcon_plugin.report.crops import Crops, short_paths
from selcon_plugin.report.document import Cell, Picture, Strip, Table
from selcon_plugin.runs.embedding import EmbeddingRecord
from selcon_plugin.runs.ranked import RankedImage, RankedQuery

_SHEETS = 6  # number of clusters per kind
_SHEET_CROPS = 8
_SMALLEST_SHOWN = 4
_LISTED_CLUSTERS = 100


@dataclass(frozen=True)
class ClusterGallery:
    """Example clusters of a run, and a table of the largest ones.

    Attributes:
        kinds: Headings, each with its clusters.
        table_title: Heading of the table.
        table: The largest clusters.
        smallest: Minimum size of a cluster that is ranked by its silhouette.
    """

    kinds: Sequence[tuple[str, Sequence[Strip]]]
    table_title: str
    table: Table
    smallest: int = _SMALLEST_SHOWN


@dataclass(frozen=True)
class RankedLists:
    """Queries with their top-ranked images.

    Attributes:
        groups: Headings, which may be empty, each with its queries.
        with_identities: Whether ground-truth identities mark results as right or wrong.
    """

    groups: Sequence[tuple[str, Sequence[Strip]]]
    with_identities: bool


def cluster_gallery(run: RunData, crops: Crops) -> ClusterGallery | None:
    """Select the largest clusters, and those with the highest and lowest silhouette.

    Args:
        run: The run.
        crops: Encodes the images.

    Returns:
        The clusters; None if they are unknown.
    """
    record, images = run.embedding, run.images
    if record is None or images is None or not record.clustered:
        return None
    clusters = _Clusters(record, images, crops)
    sizes, silhouettes = clusters.sizes, clusters.silhouettes
    by_size = np.argsort(-sizes, kind="stable").tolist()
    rated = [
        c for c in by_size if sizes[c] >= _SMALLEST_SHOWN and math.isfinite(silhouettes[c])
    ]
    kinds = {
        "Largest": by_size,
        "Highest silhouette": sorted(rated, key=lambda c: -silhouettes[c]),
        "Lowest silhouette": sorted(rated, key=lambda c: silhouettes[c]),
    }
    rows = [clusters.row(c) for c in by_size[:_LISTED_CLUSTERS]]
    heading = "All clusters" if len(rows) == len(sizes) else f"The {len(rows)} largest"
    return ClusterGallery(
        [
            (kind, [clusters.strip(c) for c in chosen[:_SHEETS]])
            for kind, chosen in kinds.items()
            if chosen
        ],
        f"{heading}, as a table",
        Table(["Cluster", "Images", "Cameras", "Silhouette"], rows),
    )


class _Clusters:
    """The sizes, cameras and silhouettes of the clusters, and their images."""

    def __init__(
        self, record: EmbeddingRecord, images: TrainingImages, crops: Crops
    ) -> None:
        self._record, self._images, self._crops = record, images, crops
        self._names = short_paths(images.paths)
        inside = record.labels >= 0
        self.sizes = np.bincount(record.labels[inside], minlength=record.num_clusters)
        self.cameras = cameras_of_clusters(record.labels, images.camids)
        sums = np.bincount(
            record.labels[inside],
            weights=record.silhouette.astype(np.float64)[inside],
            minlength=len(self.sizes),
        )
        self.silhouettes: np.ndarray[Any, Any] = sums / np.maximum(self.sizes, 1)

    def row(self, cluster: int) -> list[str]:
        cameras = self.cameras[cluster]
        return [
            str(cluster),
            str(self.sizes[cluster]),
            str(cameras) if cameras else UNKNOWN,
            number(round(float(self.silhouettes[cluster]), 3)),
        ]

    def strip(self, cluster: int) -> Strip:
        """Select evenly spaced images, from the highest to the lowest silhouette."""
        images, silhouette = self._images, self._record.silhouette
        members = np.flatnonzero(self._record.labels == cluster)
        typical = np.nan_to_num(silhouette[members].astype(np.float64))
        members = members[np.argsort(-typical, kind="stable")]
        count = min(_SHEET_CROPS, len(members))
        chosen = members[np.linspace(0, len(members) - 1, count).round().astype(int)]
        cells = [
            Cell(
                _picture(
                    self._crops,
                    images.paths[i],
                    _with_camera(self._names[i], images.camera(images.camids[i])),
                )
            )
            for i in chosen.tolist()
        ]
        return Strip(self._title(cluster), cells)

    def _title(self, cluster: int) -> str:
        parts = [_plural(int(self.sizes[cluster]), "image")]
        if self.cameras[cluster]:
            parts.append(_plural(int(self.cameras[cluster]), "camera"))
        if math.isfinite(self.silhouettes[cluster]):
            parts.append(f"silhouette {round(self.silhouettes[cluster], 2) + 0.0:.2f}")
        if self._images.identities_known:
            people = len(np.unique(self._images.pids[self._record.labels == cluster]))
            parts.append(_plural(people, "true identity", "true identities"))
        return f"Cluster {cluster}: {', '.join(parts)}"


def ranked_results(run: RunData, crops: Crops) -> RankedLists | None:
    """Show the queries of the test sets with their hits and misses.

    Args:
        run: The run.
        crops: Encodes the images.

    Returns:
        The queries; None if the run has no test set.
    """
    if not run.ranked:
        return None
    several = len(run.ranked) > 1
    groups = [
        (name if several else "", [_query_strip(query, crops) for query in queries])
        for name, queries in run.ranked.items()
    ]
    return RankedLists(groups, with_identities=True)


def _query_strip(query: RankedQuery, crops: Crops) -> Strip:
    precision, camera = query.average_precision, camera_name(query.camid)
    known = ", no match in the gallery"
    if not math.isnan(precision):
        known = f", average precision {100 * precision:.0f} %"
    text = f"query {Path(query.path).name}, camera {camera}"
    cells = [Cell(_picture(crops, query.path, text), "query", "query")]
    found = 0
    for rank, result in enumerate(query.results, start=1):
        found += result.right
        # Every match of a query of 100 % comes before the first other image.
        complete = found >= query.num_matches if query.num_matches else precision == 1.0
        cells.append(_result(rank, result, crops, rest=complete and not result.right))
    return Strip(f"Person {query.pid}, camera {camera}{known}", cells)


def _result(rank: int, result: RankedImage, crops: Crops, *, rest: bool) -> Cell:
    """Describe a result; ``rest`` if all matches come before it."""
    kind, sign, meaning = (
        ("hit", "✓", "same person") if result.right else ("miss", "✗", "different person")
    )
    if rest:
        kind, sign, meaning = "", "", "different person, after the last match"
    text = (
        f"rank {rank}, {meaning}: {Path(result.path).name}, camera "
        f"{camera_name(result.camid)}, distance {result.distance:.3g}"
    )
    return Cell(_picture(crops, result.path, text), f"{sign} {rank}".strip(), kind)


def nearest_neighbors(run: RunData, crops: Crops) -> RankedLists | None:
    """Show some training images with their nearest neighbors in feature space.

    Args:
        run: The run.
        crops: Encodes the images.

    Returns:
        The images; None if they are unknown.
    """
    record, images = run.embedding, run.images
    if record is None or images is None or not len(record.anchors):
        return None
    names = short_paths(images.paths)

    def picture(i: int) -> Picture:
        text = _with_camera(names[i], images.camera(images.camids[i]))
        if record.clustered:
            label = record.labels[i]
            text += f", cluster {label}" if label >= 0 else ", no cluster"
        return _picture(crops, images.paths[i], text)

    strips = []
    for anchor, neighbors, cosines in zip(
        record.anchors.tolist(),
        record.neighbors.tolist(),
        record.similarity.tolist(),
        strict=True,
    ):
        query = picture(anchor)
        cells = [Cell(query, "image", "query")]
        cells += [
            Cell(picture(i), f"{cosine:.2f}")
            for i, cosine in zip(neighbors, cosines, strict=True)
        ]
        strips.append(Strip(query.text, cells))
    return RankedLists([("", strips)], with_identities=False)


def _picture(crops: Crops, path: str, text: str) -> Picture:
    return Picture(crops.uri(path), text)


def _with_camera(name: str, camera: str) -> str:
    return f"{name}, camera {camera}" if camera else name


def _plural(count: int, noun: str, plural: str = "") -> str:
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
