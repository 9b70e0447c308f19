"""Label filters for unreliable clusters, single-camera clusters and outliers."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering.base import Labeler
from selcon_plugin.clustering.pseudo_labels import (
    OUTLIER,
    PseudoLabels,
    outliers_as_singletons,
)
from selcon_plugin.clustering.quality import contingency
from selcon_plugin.memory.writes import cluster_means

logger = logging.getLogger(__name__)

# Largest number of outlier-to-cluster similarities held in memory at once.
_CHUNK_ENTRIES = 20_000_000


class _StatelessFilter:
    """Base class of filters without state between epochs."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state."""


class ReliabilityFilter:
    """Self-paced reliability criterion of SpCL (NeurIPS 2020): keep clusters stable in eps.

    The filter uses the clusterings at eps, at eps - delta (tight) and at eps + delta
    (loose), with each outlier as a singleton cluster, and the IoU of an image's clusters in
    two clusterings: images in both over images in either. Then

    * R_comp(i) = 1 - IoU(cluster, tight cluster) of image i is large if the cluster falls
      apart when eps decreases. An image is kept if no other image of its cluster has a
      smaller value;
    * R_indep(c) = the smallest 1 - IoU(cluster, loose cluster) in cluster c is large if the
      cluster merges with others when eps increases. A cluster is kept up to a threshold:
      the ``quantile`` of R_indep over the clusters found when the filter is first used (the
      value of rank round(quantile * clusters)), which is fixed from then on.

    All other images, and images left alone in their cluster, become outliers. This filter
    must come first: it compares its input labels with the clusterings of the labeler.

    Args:
        delta: Change of eps, above 0; with DBSCAN at most its ``graph_margin``.
        quantile: Fraction of the clusters kept at first use, in (0, 1].

    Attributes:
        threshold: Largest R_indep of a kept cluster; None before the first use.

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
        """Turn unreliable images into outliers.

        Args:
            pseudo_labels: Output of a labeler with eps.
            features: Not used.
            camids: Not used.
            labeler: Labeler that clusters the same distances at eps - delta and
                eps + delta.

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
        # Equal ratios of integers are equal floats, so the plain comparison is exact.
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
        """Restore a state returned by :meth:`state_dict`."""
        self.threshold = state.get("threshold")


class SingleCameraFilter(_StatelessFilter):
    """Filter that drops clusters seen by a single camera (JCL, Remote Sensing 2024).

    Such a cluster teaches the appearance of the camera, not the identity of the person. A
    cluster with an image of unknown camera (-1) is kept. If fewer than two cameras are
    known, the filter only warns, once.
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
        """Turn the images of single-camera clusters into outliers.

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
                    "fewer than two cameras are known: clusters seen by a single camera "
                    "are kept"
                )
                self._warned = True
            return pseudo_labels
        labels, cameras = pseudo_labels.labels.numpy(), camids.numpy()
        inside = labels != OUTLIER
        counts = contingency(labels[inside], cameras[inside])
        is_single = np.diff(counts.indptr) == 1
        unknown = labels[inside & (cameras < 0)]
        is_single[unknown] = False
        dropped = np.zeros_like(inside)
        dropped[inside] = is_single[labels[inside]]
        return _relabeled(pseudo_labels, np.where(dropped, OUTLIER, labels))


class OutlierPolicy(_StatelessFilter):
    """Final filter that drops outliers, makes them singletons or assigns them to clusters.

    ``measured["found_outlier_ratio"]`` keeps the outlier ratio before the policy.

    Args:
        policy: ``"drop"`` excludes outliers from training (Cluster Contrast),
            ``"singleton"`` makes each its own cluster, numbered after the others (SpCL),
            ``"nearest"`` assigns each to the cluster with the most similar mean feature;
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
            The labels; outliers remain only under ``"drop"`` or without clusters.
        """
        labels = pseudo_labels.labels.clone()
        outliers = (labels == OUTLIER).nonzero().flatten()
        if self.policy == "singleton":
            labels = torch.from_numpy(outliers_as_singletons(labels.numpy()))
        elif self.policy == "nearest" and pseudo_labels.num_clusters:
            labels[outliers] = _nearest_cluster(pseudo_labels, features, outliers)
        found = {"found_outlier_ratio": pseudo_labels.outlier_ratio}
        return replace(
            pseudo_labels, labels=labels, measured={**pseudo_labels.measured, **found}
        )


def _cluster_overlap(
    labels: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the IoU of each image's clusters in two labelings; outliers are singletons."""
    first, second = outliers_as_singletons(labels), outliers_as_singletons(other)
    pairs = first * len(labels) + second
    _, which, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    shared = counts[which]
    either = np.bincount(first)[first] + np.bincount(second)[second] - shared
    return np.asarray(shared / either)


def _smallest(
    values: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the smallest value in each cluster."""
    smallest = np.full(labels.max() + 1, np.inf)
    inside = labels != OUTLIER
    np.minimum.at(smallest, labels[inside], values[inside])
    return smallest


def _nearest_cluster(
    pseudo_labels: PseudoLabels, features: Tensor, images: Tensor
) -> Tensor:
    """Return, for each image, the cluster with the most similar mean feature."""
    means = cluster_means(features, pseudo_labels.labels)
    step = max(1, _CHUNK_ENTRIES // len(means))
    nearest = [
        (features[rows.to(features.device)] @ means.T).argmax(dim=1).cpu()
        for rows in torch.split(images, step)
    ]
    return torch.cat(nearest) if nearest else images


def _relabeled(pseudo_labels: PseudoLabels, labels: NDArray[np.int64]) -> PseudoLabels:
    """Replace the labels by others, renumbered without gaps."""
    return replace(pseudo_labels, labels=PseudoLabels.numbered(labels).labels)
