"""Clusters of a folder of images, and their output as a table and as folders of links.

Shape shorthand in this module:

    M: images
    C: length of a feature
    K: clusters
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selcon_plugin.clustering import (
    OUTLIER,
    PseudoLabels,
    build_labeler,
    labeler_names,
    labeler_options,
)
from selcon_plugin.clustering.camera_centering import center_cameras
from selcon_plugin.clustering.confidence import cohesion, pair_confidence
from selcon_plugin.clustering.multi_scale import multi_scale_distance
from selcon_plugin.clustering.remedies import fewer_outliers
from selcon_plugin.config.checks import check_name
from selcon_plugin.features import check_features
from selcon_plugin.io.output_files import check_output_file
from selcon_plugin.io.tables import write_table

__all__ = [
    "FolderClusters",
    "assess_clusters",
    "chosen_labeler",
    "cluster_features",
    "default_options",
    "summary",
]

# For any number of images per person, without any option; see docs/benchmarks/folders.md.
_DEFAULT_LABELERS = ("Agglomerative", "DBSCAN")
_CSV_COLUMNS = ("image", "cluster", "confidence", "camera", "cohesion")
# What the summary tells of a clustering.
_MEASURED = {
    "eps": "eps",
    "threshold": "threshold",
    "images_per_person": "images per person about",
}
_LOW_CONFIDENCE = 0.5
_LOW = (
    ": more than half of the pairs in clusters are expected to be of different persons, as "
    "this network hardly discriminates these persons; use one that was trained on persons, "
    "or train on these images (selcon train)"
)


@dataclass(frozen=True)
class FolderClusters:
    """The clusters of a folder of images, the content of the table of ``selcon cluster``.

    Attributes:
        paths: Path of each image, or its row number where there is no path.
        cameras: Name of each image's camera; "" if unknown.
        labels: Cluster of each image, int64 ``(M,)``; -1 for an outlier. The largest
            cluster is 0.
        confidence: Probability that another image of the cluster shows the same person,
            float32 ``(M,)``; see :mod:`selcon_plugin.clustering.confidence`.
        folder: Folder to which the names in the table are relative; "" to write the paths
            as they are.
        measured: What the labeler measured, such as ``threshold``, by name.
        cohesion: Whether each cluster has one center, float32 ``(K,)`` in 0..1; see
            :func:`~selcon_plugin.clustering.confidence.cohesion`. None if unknown.
    """

    paths: Sequence[str]
    cameras: Sequence[str]
    labels: NDArray[np.int64]
    confidence: NDArray[np.float32]
    folder: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    cohesion: NDArray[np.float32] | None = None

    @property
    def num_clusters(self) -> int:
        """Return the number of clusters, without the outliers."""
        return int(self.labels.max(initial=OUTLIER)) + 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return the number of images of each cluster, int64 ``(K,)``."""
        return np.bincount(self.labels[self.labels != OUTLIER]).astype(np.int64)

    @property
    def num_outliers(self) -> int:
        """Return the number of images in no cluster."""
        return int((self.labels == OUTLIER).sum())

    @property
    def representatives(self) -> NDArray[np.int64]:
        """Return the image that belongs most clearly to each cluster, int64 ``(K,)``.

        ``paths[representatives[3]]`` shows whom cluster 3 contains.
        """
        inside = np.flatnonzero(self.labels != OUTLIER)
        order = inside[np.lexsort((-self.confidence[inside], self.labels[inside]))]
        _, first = np.unique(self.labels[order], return_index=True)
        best: NDArray[np.int64] = order[first].astype(np.int64)
        return best

    def members(self, cluster: int) -> NDArray[np.int64]:
        """Return the images of a cluster, the most confident first.

        Args:
            cluster: Number of the cluster; -1 for the outliers.
        """
        images = np.flatnonzero(self.labels == cluster)
        order = np.argsort(-self.confidence[images], kind="stable")
        members: NDArray[np.int64] = images[order].astype(np.int64)
        return members

    def to_csv(self, file: str | Path) -> None:
        """Write the table of ``selcon cluster``, one row per image.

        Its columns are image, cluster, confidence, camera, and cohesion of the cluster.

        The table is sorted by image. Names are written such that no spreadsheet takes one
        for a formula; :func:`selcon_plugin.io.tables.read_table` returns them exactly.

        Args:
            file: The file to write or replace.

        Raises:
            ValueError: If an existing file of this name is not a ``.csv`` file.
        """  # noqa: DOC502  (raised by the function called here)
        check_output_file(file, name="file", kinds=(".csv",))
        names = list(self.paths)
        if self.folder:
            names = [relative_name(path, self.folder) for path in names]
        rows = (
            (
                names[image],
                int(self.labels[image]),
                f"{self.confidence[image]:.4f}",
                self.cameras[image],
                self._cohesion_of(image),
            )
            for image in sorted(range(len(names)), key=names.__getitem__)
        )
        write_table(file, _CSV_COLUMNS, rows)

    def _cohesion_of(self, image: int) -> str:
        cluster = self.labels[image]
        if self.cohesion is None or cluster == OUTLIER:
            return ""
        return f"{self.cohesion[cluster]:.4f}"


def chosen_labeler(labeler: str, options: Mapping[str, Any] | None) -> str:
    """Return the labeler for options, if none is named.

    Args:
        labeler: Registered name, or "" for none.
        options: Options of the labeler.

    Returns:
        The name; without one the first of Agglomerative and DBSCAN that has the options.
    """
    if labeler:
        return labeler
    known = {name: set(labeler_options(name)) for name in _DEFAULT_LABELERS}
    given = set(options or ()) & {n for names in known.values() for n in names}
    return next((n for n in known if given <= known[n]), _DEFAULT_LABELERS[0])


def default_options(labeler: str) -> dict[str, Any]:
    """Return the options that make a labeler choose for itself, whatever the images.

    Args:
        labeler: Registered name of the labeler.

    Returns:
        "auto" for each option that can be.

    Raises:
        ValueError: If the labeler does not exist.
    """  # noqa: DOC502  (raised by the functions called here)
    check_name("--labeler", labeler, labeler_names())
    known = labeler_options(labeler)
    return {n: "auto" for n, option in known.items() if "auto" in option.special_values}


def cluster_features(
    features: NDArray[np.float32],
    camids: NDArray[np.int64] | None = None,
    *,
    labeler: str = "",
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> PseudoLabels:
    """Cluster images, and number the clusters by size.

    Args:
        features: Unit vectors, shape ``(M, C)``.
        camids: Camera of each image, ``(M,)``, -1 if unknown, for per-camera feature
            centering before the clustering; None to ignore cameras.
        labeler: Registered name of the labeler; "" for that of :func:`chosen_labeler`.
        options: Options of the labeler; :func:`default_options` determines the others.
        device: Device of the computations with PyTorch.

    Returns:
        The clusters, the largest numbered 0, with the measurements of the labeler.

    Raises:
        BadFeaturesError: If the features are not unit vectors.
        ValueError: If the labeler or an option is unknown, or a value is illegal.
    """  # noqa: DOC502  (raised by the functions called here)
    features = check_features(features, source="the features to cluster")
    labeler = chosen_labeler(labeler, options)
    values = {**default_options(labeler), **(options or {})}
    clusterer = build_labeler(labeler, center_cameras=True, **values)
    found = clusterer(
        torch.from_numpy(features).to(device),
        None if camids is None else torch.from_numpy(camids),
    )
    order = torch.argsort(found.sizes, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    labels = found.labels.clone()
    inside = labels != OUTLIER
    labels[inside] = rank[labels[inside]]
    return PseudoLabels(labels, distance=found.distance, measured=found.measured)


def assess_clusters(
    features: NDArray[np.float32],
    camids: NDArray[np.int64] | None,
    labels: NDArray[np.int64],
    *,
    distance: Any = None,
    device: str = "cpu",
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute the confidence of each image, and the cohesion of each cluster.

    Args:
        features: See :func:`cluster_features`.
        camids: See :func:`cluster_features`.
        labels: Cluster of each image, -1 for an outlier, ``(M,)``.
        distance: The multi-scale Jaccard distance of the images, if it is known already.
        device: See :func:`cluster_features`.

    Returns:
        Confidence ``(M,)`` and cohesion ``(K,)``, see
        :mod:`selcon_plugin.clustering.confidence`.
    """
    vectors = torch.from_numpy(features).to(device)
    if camids is not None:
        vectors = center_cameras(vectors, torch.from_numpy(camids))
    if distance is None:
        distance = multi_scale_distance(vectors)
    return pair_confidence(vectors, distance, labels), cohesion(distance, labels)


def summary(found: FolderClusters, labeler: str) -> str:
    """Describe clusters in a line: how many, of which sizes, how confident.

    Args:
        found: The clusters.
        labeler: Registered name of the labeler, for the remedy if there are none.

    Returns:
        The line, without a full stop.
    """
    if not found.num_clusters:
        remedy = fewer_outliers(labeler_options(labeler))
        return f"No cluster was found; {remedy}, or train on these images first"
    sizes, num_outliers = found.sizes, found.num_outliers
    inside = found.labels >= 0
    confidence = float(found.confidence[inside].mean())
    return (
        f"{found.num_clusters} clusters of {sizes.min()} to {sizes.max()} images, "
        f"{num_outliers} outliers ({100 * num_outliers / len(found.labels):.0f} %)"
        + "".join(
            f", {text} {found.measured[name]:.2g}"
            for name, text in _MEASURED.items()
            if name in found.measured
        )
        + f", mean confidence {confidence:.2f}"
        + (_LOW if confidence < _LOW_CONFIDENCE else "")
    )


def relative_name(path: str | Path, folder: str | Path) -> str:
    """Return an image's path below the folder, with forward slashes."""
    return Path(os.path.relpath(path, Path(folder).expanduser())).as_posix()
