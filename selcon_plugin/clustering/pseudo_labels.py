"""Pseudo-labels: the result of clustering that a method trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from torch import Tensor

OUTLIER = -1


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """Cluster labels of the training images, with measurements of the clustering.

    Attributes:
        labels: Cluster of each image, int64 ``(M,)`` on the CPU: 0..num_clusters - 1
            without gaps, and -1 for outliers.
        distance: Sparse distances between images, ``scipy.sparse.csr_array (M, M)``, that
            were clustered; entries that are not stored are 1. None if the labeler computes
            no distances.
        measured: Values to report: automatically chosen settings (``eps``) and label-free
            quality metrics.
        instance_level: Whether every image is its own class instead of a cluster member:
            the fallback for an epoch whose clusters cannot be trained on.
        labelings: The T clusterings combined by an ensemble, int64 ``(T, M)`` on the CPU,
            -1 for an outlier; None from a labeler that makes only one.
    """

    labels: Tensor
    distance: Any = None
    measured: Mapping[str, float] = field(default_factory=dict)
    instance_level: bool = False
    labelings: Tensor | None = None

    def __post_init__(self) -> None:
        labels = self.labels
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(
                "labels must be int64 of shape (M,), got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        given = self.labelings
        if given is not None and (given.dim() != 2 or given.shape[1] != len(labels)):
            raise ValueError(
                f"labelings must hold clusterings of the {len(labels)} images, shape "
                f"(T, M), got shape {tuple(given.shape)}"
            )
        used = torch.unique(labels)
        used = used[used != OUTLIER]
        if not torch.equal(used, torch.arange(len(used))):
            raise ValueError(
                "labels must be -1 or number the clusters 0, 1, ... without a gap: use "
                "PseudoLabels.numbered() to renumber them"
            )

    @classmethod
    def numbered(cls, labels: ArrayLike, **other: Any) -> PseudoLabels:
        """Renumber labels 0, 1, ... in the order of each cluster's first image.

        Args:
            labels: Integers, negative for outliers, shape ``(M,)``.
            **other: The other attributes.

        Returns:
            The same partition with consecutive cluster numbers.

        Example:
            >>> PseudoLabels.numbered([7, -1, 3, 7]).labels.tolist()
            [0, -1, 1, 0]
        """
        raw = np.asarray(labels, dtype=np.int64)
        result = np.full(len(raw), OUTLIER, dtype=np.int64)
        inside = raw >= 0
        _, first, inverse = np.unique(raw[inside], return_index=True, return_inverse=True)
        order = np.empty(len(first), dtype=np.int64)
        order[np.argsort(first)] = np.arange(len(first))
        result[inside] = order[inverse]
        return cls(torch.from_numpy(result), **other)

    @classmethod
    def each_its_own(cls, num_images: int, **other: Any) -> PseudoLabels:
        """Create instance-level labels: every image is its own class.

        Args:
            num_images: Number of images M.
            **other: The other attributes.

        Returns:
            Labels 0..M-1, marked ``instance_level``.
        """
        return cls(torch.arange(num_images), instance_level=True, **other)

    def among(self, kept: Tensor) -> PseudoLabels:
        """Extend labels of a subset to all images.

        Args:
            kept: Mask of the images that have labels here, bool ``(M,)``.

        Returns:
            The labels of all images; the added images are outliers without stored
            distances, or classes of their own if the labels are instance-level.
        """
        graph = self.distance
        if graph is not None:
            counts = torch.zeros(len(kept), dtype=torch.int64)
            counts[kept] = torch.from_numpy(graph.indptr).long().diff()
            indptr = np.concatenate([[0], counts.cumsum(0).numpy()])
            indices = kept.nonzero().flatten().numpy()[graph.indices]
            graph = csr_array((graph.data, indices, indptr), shape=(len(kept), len(kept)))
        if self.instance_level:
            return self.each_its_own(len(kept), distance=graph, measured=self.measured)
        labels = torch.full((len(kept),), OUTLIER)
        labels[kept] = self.labels
        labelings = self.labelings
        if labelings is not None:
            spread = torch.full((len(labelings), len(kept)), OUTLIER)
            spread[:, kept] = labelings
            labelings = spread
        return replace(self, labels=labels, distance=graph, labelings=labelings)

    @property
    def num_images(self) -> int:
        """Number of images M."""
        return len(self.labels)

    @property
    def num_clusters(self) -> int:
        """Number of clusters; outliers are not counted."""
        return int(self.labels.max()) + 1 if len(self.labels) else 0

    @property
    def num_outliers(self) -> int:
        """Number of images without a cluster."""
        return int((self.labels == OUTLIER).sum())

    @property
    def outlier_ratio(self) -> float:
        """Fraction of images without a cluster; 0 if there are no images."""
        return self.num_outliers / max(1, self.num_images)

    @property
    def sizes(self) -> Tensor:
        """Number of images in each cluster, int64 ``(num_clusters,)``."""
        inside = self.labels[self.labels != OUTLIER]
        return torch.bincount(inside, minlength=self.num_clusters)


def outliers_as_singletons(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn each outlier into a singleton cluster, numbered after the others.

    Args:
        labels: Clusters, -1 for an outlier, ``(M,)``.

    Returns:
        Labels without outliers, int64 ``(M,)``.

    Example:
        >>> outliers_as_singletons(np.array([-1, 0, 0, -1])).tolist()
        [1, 0, 0, 2]
    """
    outliers = labels == OUTLIER
    result = labels.copy()
    result[outliers] = labels.max(initial=OUTLIER) + 1 + np.arange(outliers.sum())
    return result
