"""Corrections of clusters: unreliable clusters, single-camera clusters, outliers."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering.base import Labeler
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels, outliers_alone
from selcon_plugin.clustering.quality import contingency
from selcon_plugin.memory.writes import cluster_means

logger = logging.getLogger(__name__)

# Similarities of outliers and clusters that are held at a time.
_CHUNK_ENTRIES = 20_000_000


class _StatelessFilter:
    """What filters share that remember nothing between epochs."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class ReliabilityFilter:
    """Keep what changes little with eps: SpCL's self-paced criterion (NeurIPS 2020).

    Take the clusterings at eps, at eps - delta (tight) and at eps + delta (loose), each
    outlier a cluster of its own, and for two of them the IoU of an image's clusters: images
    in both over images in either. Then

    * R_comp(i) = 1 - IoU(cluster, tight cluster) of image i: large where the cluster falls
      apart when eps shrinks. An image is kept if no other of its cluster has a smaller one;
    * R_indep(c) = the smallest 1 - IoU(cluster, loose cluster) in cluster c: large where it
      merges with others when eps grows. A cluster is kept up to a threshold, the
      ``quantile`` of R_indep over the clusters found when the filter is first used (the
      value of rank round(quantile * clusters)), which then stays as it is.

    The rest, and an image that is left alone in its cluster, becomes an outlier. Put this
    filter first: it compares the labels it is given with the labeler's.

    Args:
        delta: Change of eps, above 0; with DBSCAN at most its ``graph_margin``.
        quantile: Share of the clusters that pass at first, in (0, 1].

    Attributes:
        threshold: Largest R_indep of a kept cluster; None before the first clusters.

    Raises:
        ValueError: If an argument is out of range; when called, if the labeler has no eps.
    """

    def __init__(self, delta: float = 0.02, quantile: float = 0.9) -> None:
        if not 0 < delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {delta}")
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
        self.delta = delta
        self.quantile = quantile
        self.threshold: float | None = None

    def __call__(
        self,
        pseudo_labels: PseudoLabels,
        features: Tensor,
        camids: Tensor | None,
        labeler: Labeler,
    ) -> PseudoLabels:
        """Make unreliable images outliers.

        Args:
            pseudo_labels: What a labeler with eps found.
            features: Not used.
            camids: Not used.
            labeler: Clusters the same distances at eps - delta and eps + delta.

        Returns:
            Corrected labels.
        """
        tight = labeler.labels_at(pseudo_labels, -self.delta).numpy()
        loose = labeler.labels_at(pseudo_labels, self.delta).numpy()
        labels = pseudo_labels.labels.numpy()
        inside = labels != OUTLIER
        if not inside.any():
            return pseudo_labels
        apart = 1 - _cluster_overlap(labels, tight)
        merged = _smallest(1 - _cluster_overlap(labels, loose), labels)
        if self.threshold is None:
            rank = min(max(1, round(self.quantile * len(merged))), len(merged))
            self.threshold = float(np.sort(merged)[rank - 1])
        keep = np.zeros_like(inside)
        own = labels[inside]
        # Equal shares of whole numbers are equal floats: a plain comparison is exact.
        keep[inside] = (merged[own] <= self.threshold) & (
            apart[inside] <= _smallest(apart, labels)[own]
        )
        left = np.bincount(labels[keep], minlength=len(merged))
        keep[inside] &= left[own] > 1
        return _relabeled(pseudo_labels, np.where(keep, labels, OUTLIER))

    def state_dict(self) -> dict[str, Any]:
        """Return the threshold."""
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.threshold = state.get("threshold")


class SingleCameraFilter(_StatelessFilter):
    """Make clusters outliers that a single camera sees (JCL, Remote Sensing 2024).

    Such a cluster teaches what the camera looks like, not who the person is. A cluster with
    an image of unknown camera (-1) is kept. Where fewer than two cameras are known nothing
    is done but a warning, once.
    """

    def __init__(self) -> None:
        self._warned = False

    def __call__(
        self,
        pseudo_labels: PseudoLabels,
        features: Tensor,
        camids: Tensor | None,
        labeler: Labeler,
    ) -> PseudoLabels:
        """Make single-camera clusters outliers.

        Args:
            pseudo_labels: Labels of M images.
            features: Not used.
            camids: Camera of each image, int64 ``(M,)``, -1 where unknown, or None.
            labeler: Not used.

        Returns:
            Corrected labels.
        """
        if camids is None or len(torch.unique(camids[camids >= 0])) < 2:
            if not self._warned:
                logger.warning(
                    "fewer than two cameras are known: no cluster is left out for being "
                    "seen by a single one"
                )
                self._warned = True
            return pseudo_labels
        labels, cameras = pseudo_labels.labels.numpy(), camids.numpy()
        inside = labels != OUTLIER
        counts = contingency(labels[inside], cameras[inside])
        is_single = np.diff(counts.indptr) == 1
        unknown = labels[inside & (cameras < 0)]
        is_single[unknown] = False
        gone = np.zeros_like(inside)
        gone[inside] = is_single[labels[inside]]
        return _relabeled(pseudo_labels, np.where(gone, OUTLIER, labels))


class OutlierPolicy(_StatelessFilter):
    """Decide what becomes of outliers; the last of the filters.

    ``measured["found_outlier_ratio"]`` keeps their share before.

    Args:
        policy: ``"drop"`` leaves them out of training (Cluster Contrast), ``"singleton"``
            makes each a cluster of its own, numbered after the others (SpCL),
            ``"nearest"`` puts each into the cluster whose mean feature is most similar;
            without clusters they stay outliers.

    Raises:
        ValueError: If the policy is unknown.
    """

    def __init__(self, policy: Literal["drop", "singleton", "nearest"] = "drop") -> None:
        if policy not in ("drop", "singleton", "nearest"):
            raise ValueError(
                f"policy must be 'drop', 'singleton' or 'nearest', got {policy!r}"
            )
        self.policy = policy

    def __call__(
        self,
        pseudo_labels: PseudoLabels,
        features: Tensor,
        camids: Tensor | None,
        labeler: Labeler,
    ) -> PseudoLabels:
        """Apply the policy.

        Args:
            pseudo_labels: Labels of M images.
            features: Unit features, float32 ``(M, C)``, on any device.
            camids: Not used.
            labeler: Not used.

        Returns:
            Labels, without outliers unless they are dropped.
        """
        labels = pseudo_labels.labels.clone()
        outliers = (labels == OUTLIER).nonzero().flatten()
        if self.policy == "singleton":
            labels = torch.from_numpy(outliers_alone(labels.numpy()))
        elif self.policy == "nearest" and pseudo_labels.num_clusters:
            labels[outliers] = _nearest_cluster(pseudo_labels, features, outliers)
        share = {"found_outlier_ratio": pseudo_labels.outlier_ratio}
        return replace(
            pseudo_labels, labels=labels, measured={**pseudo_labels.measured, **share}
        )


def _cluster_overlap(
    labels: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.float64]:
    """IoU of every image's clusters in two labelings; an outlier is alone in its own."""
    first, second = outliers_alone(labels), outliers_alone(other)
    pairs = first * len(labels) + second
    _, which, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    shared = counts[which]
    either = np.bincount(first)[first] + np.bincount(second)[second] - shared
    return np.asarray(shared / either)


def _smallest(
    values: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Smallest value in each cluster."""
    smallest = np.full(labels.max() + 1, np.inf)
    inside = labels != OUTLIER
    np.minimum.at(smallest, labels[inside], values[inside])
    return smallest


def _nearest_cluster(
    pseudo_labels: PseudoLabels, features: Tensor, images: Tensor
) -> Tensor:
    """Cluster whose mean feature is most similar to each of the images."""
    means = cluster_means(features, pseudo_labels.labels)
    step = max(1, _CHUNK_ENTRIES // len(means))
    nearest = [
        (features[rows.to(features.device)] @ means.T).argmax(dim=1).cpu()
        for rows in torch.split(images, step)
    ]
    return torch.cat(nearest) if nearest else images


def _relabeled(pseudo_labels: PseudoLabels, labels: NDArray[np.int64]) -> PseudoLabels:
    """Put other labels in place, numbered without a gap."""
    return replace(pseudo_labels, labels=PseudoLabels.numbered(labels).labels)
