"""Clusterings of one folder: this plugin's, and baselines with their oracles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import DBSCAN, HDBSCAN
from sklearn.metrics import silhouette_score

from selcon_plugin.clustering.auto_threshold import THRESHOLDS
from selcon_plugin.clustering.camera_centering import center_cameras
from selcon_plugin.clustering.linkage import average_linkage
from selcon_plugin.clustering.multi_scale import multi_scale_distance
from selcon_plugin.clustering.pseudo_labels import outliers_as_singletons
from selcon_plugin.metrics.identities import cluster_diagnostics
from selcon_plugin.workflows.folder_clusters import assess_clusters, cluster_features

Labels = NDArray[np.int64]

_HDBSCAN_SIZES = (2, 3, 4, 5, 8, 12)
_CUTS = np.linspace(0.05, 0.95, 37)  # quantiles of the merge heights, or of neighbors


@dataclass(frozen=True)
class Score:
    """Agreement of clusters and persons.

    Attributes:
        ami: Adjusted mutual information.
        f1: F1 of the pairs of images that share a cluster; an outlier shares none.
    """

    ami: float
    f1: float


def score(labels: Labels, identities: Labels) -> Score:
    """Compare clusters with persons; each outlier is a cluster of its own.

    Args:
        labels: Cluster of each image, -1 for an outlier, ``(M,)``.
        identities: Person of each image, ``(M,)``.

    Returns:
        The agreement.
    """
    found = cluster_diagnostics(torch.from_numpy(labels), torch.from_numpy(identities))
    precision, recall = found["pair_precision"], found["pair_recall"]
    both = precision + recall
    return Score(found["ami"], 2 * precision * recall / both if both > 0 else 0.0)


def calibration(
    confidence: NDArray[np.float32], labels: Labels, identities: Labels
) -> list[list[float]]:
    """Compare confidences with the truth, in ten bins.

    Args:
        confidence: Confidence of each image, ``(M,)``.
        labels: Cluster of each image, -1 for an outlier, ``(M,)``.
        identities: Person of each image, ``(M,)``.

    Returns:
        By bin: images, sum of their confidences, and sum of the fractions of the other
        images of their cluster that show the same person.
    """
    inside = labels >= 0
    shape = (int(labels.max(initial=0)) + 1, int(identities.max()) + 1)
    together = np.zeros(shape)
    np.add.at(together, (labels[inside], identities[inside]), 1)
    size = np.bincount(labels[inside], minlength=shape[0])[labels[inside]]
    true = (together[labels[inside], identities[inside]] - 1) / np.maximum(size - 1, 1)
    place = np.minimum((confidence[inside] * 10).astype(int), 9)
    sums = [
        np.bincount(place, weights=w, minlength=10)
        for w in (None, confidence[inside], true)
    ]
    return [[float(part[row]) for part in sums] for row in range(10)]


def calibration_error(folders: Iterable[list[list[float]]]) -> float:
    """Return the expected calibration error of all folders together.

    Args:
        folders: Results of :func:`calibration`.

    Returns:
        Mean distance of the stated and the true fraction, weighted by images.
    """
    bins = np.sum([np.array(folder) for folder in folders], axis=0)
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / max(1, bins[:, 0].sum()))


def clusterings(
    features: NDArray[np.float32], camids: Labels, identities: Labels
) -> dict[str, dict[str, Any]]:
    """Cluster one folder by every method.

    Args:
        features: Unit vectors ``(M, C)``.
        camids: Camera of each image, -1 if unknown, ``(M,)``.
        identities: Person of each image, for the scores and oracles only, ``(M,)``.

    Returns:
        AMI and F1 by method, and :func:`calibration` of this plugin's. An oracle is the
        setting with the best value of each.
    """
    people = len(np.unique(identities))
    hint = len(identities) / people
    found: dict[str, dict[str, Any]] = {}

    def own(name: str, labeler: str = "", **options: Any) -> None:
        clusters = cluster_features(features, camids, labeler=labeler, options=options)
        labels = clusters.labels.numpy()
        found[name] = {**vars(score(labels, identities))}
        if not labeler:
            confidence, _ = assess_clusters(
                features, camids, labels, distance=clusters.distance
            )
            found[name]["calibration"] = calibration(confidence, labels, identities)

    own("selcon")
    own("selcon, hint", images_per_person=hint)
    own("selcon, DBSCAN", "DBSCAN")
    own("selcon, HDBSCAN", "HDBSCAN")
    published = {"k1": 30, "k2": 6, "min_samples": 4, "eps": 0.6}
    own("DBSCAN, published sizes", "DBSCAN", **published)
    found["selcon, oracle"] = _best(_own_cuts(features, camids), identities)
    similarity = np.clip(features @ features.T, -1, 1).astype(np.float64)
    distance = np.maximum(0, 1 - (similarity + similarity.T) / 2)
    np.fill_diagonal(distance, 0)
    for name, tried in (
        ("HDBSCAN", _hdbscan(distance)),
        ("average linkage", _linkage(distance)),
        ("DBSCAN, cosine", _dbscan(distance)),
    ):
        trials = list(tried)
        chosen = max(trials, key=lambda labels: _silhouette(distance, labels))
        found[name] = vars(score(chosen, identities))
        found[f"{name}, oracle"] = _best(trials, identities)
    default = HDBSCAN(metric="precomputed", copy=True).fit(np.sqrt(2 * distance)).labels_
    found["HDBSCAN, scikit-learn's defaults"] = vars(score(default, identities))
    return found


def _best(trials: Iterable[Labels], identities: Labels) -> dict[str, float]:
    scores = [score(labels, identities) for labels in trials]
    return {"ami": max(s.ami for s in scores), "f1": max(s.f1 for s in scores)}


def _own_cuts(features: NDArray[np.float32], camids: Labels) -> Iterable[Labels]:
    centered = center_cameras(torch.from_numpy(features), torch.from_numpy(camids))
    hierarchy = average_linkage(multi_scale_distance(centered))
    for threshold in THRESHOLDS:
        yield hierarchy.cut(threshold)


def _silhouette(distance: NDArray[np.float64], labels: Labels) -> float:
    """Mean silhouette; an outlier is a cluster of one image, which counts as 0."""
    single = outliers_as_singletons(labels)
    clusters = len(np.unique(single))
    if not 2 <= clusters < len(labels):
        return -1.0
    return float(silhouette_score(distance, single, metric="precomputed"))


def _hdbscan(distance: NDArray[np.float64]) -> Iterable[Labels]:
    euclidean = np.sqrt(2 * distance)
    for size in _HDBSCAN_SIZES:
        if size <= len(distance):
            model = HDBSCAN(min_cluster_size=size, metric="precomputed", copy=True)
            yield model.fit(euclidean).labels_.astype(np.int64)


def _linkage(distance: NDArray[np.float64]) -> Iterable[Labels]:
    tree = linkage(squareform(distance, checks=False), "average")
    for height in np.quantile(tree[:, 2], _CUTS):
        yield fcluster(tree, height, "distance").astype(np.int64)


def _dbscan(distance: NDArray[np.float64]) -> Iterable[Labels]:
    nearest = np.sort(distance + 2 * np.eye(len(distance)), axis=1)[:, 0]
    for eps in np.quantile(nearest, _CUTS[1::2]):
        for samples in (2, 4):
            model = DBSCAN(eps=max(eps, 1e-6), min_samples=samples, metric="precomputed")
            yield model.fit(distance).labels_.astype(np.int64)
