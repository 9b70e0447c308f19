"""What clustering tells a method: a label for every training image."""

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
    """Clusters of the training images, and what was measured while making them.

    Attributes:
        labels: Cluster of each image, int64 ``(M,)`` on the CPU: 0..num_clusters - 1, every
            number in use, -1 for an outlier.
        distance: Sparse distances between images, ``scipy.sparse.csr_array (M, M)``, which
            the labels were read from; what is not stored is 1. None where the labeler works
            without.
        measured: Numbers to report: settings found on the way (``eps``) and label-free
            quality.
        instance_level: Whether these are not clusters, but every image its own class: what
            a run falls back to for an epoch whose clusters cannot be trained on.
        labelings: The T clusterings that an ensemble was joined from, int64 ``(T, M)`` on
            the CPU, -1 for an outlier; None from a labeler that makes only one.
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
                f"labelings must hold clusterings of the {len(labels)} images, (T, M), got "
                f"shape {tuple(given.shape)}"
            )
        used = torch.unique(labels)
        used = used[used != OUTLIER]
        if not torch.equal(used, torch.arange(len(used))):
            raise ValueError(
                "labels must be -1 or number the clusters 0, 1, ... without a gap; "
                "PseudoLabels.numbered() numbers them"
            )

    @classmethod
    def numbered(cls, labels: ArrayLike, **other: Any) -> PseudoLabels:
        """Number any labels 0, 1, ... by the first image of each cluster.

        Args:
            labels: Whole numbers, negative for outliers, shape ``(M,)``.
            **other: The other attributes.

        Returns:
            Labels that differ from the given ones by names alone.

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
        """Make every image its own class.

        Args:
            num_images: Images M.
            **other: The other attributes.

        Returns:
            Labels 0..M-1, marked ``instance_level``.
        """
        return cls(torch.arange(num_images), instance_level=True, **other)

    def among(self, kept: Tensor) -> PseudoLabels:
        """Return the labels of all images, from labels of some.

        Args:
            kept: Which images these are labels of, bool ``(M,)``.

        Returns:
            The same labels; of the others each is an outlier, far from everything. Where
            every image is its own class, so are the others.
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
        """Images M."""
        return len(self.labels)

    @property
    def num_clusters(self) -> int:
        """Clusters; outliers are none."""
        return int(self.labels.max()) + 1 if len(self.labels) else 0

    @property
    def num_outliers(self) -> int:
        """Images without a cluster."""
        return int((self.labels == OUTLIER).sum())

    @property
    def outlier_ratio(self) -> float:
        """Share of images without a cluster, 0 where there are no images."""
        return self.num_outliers / max(1, self.num_images)

    @property
    def sizes(self) -> Tensor:
        """Images of each cluster, int64 ``(num_clusters,)``."""
        inside = self.labels[self.labels != OUTLIER]
        return torch.bincount(inside, minlength=self.num_clusters)


def outliers_alone(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Make each outlier a cluster of its own, numbered after the others.

    Args:
        labels: Clusters, -1 for an outlier, ``(M,)``.

    Returns:
        Labels without outliers, int64 ``(M,)``.

    Example:
        >>> outliers_alone(np.array([-1, 0, 0, -1])).tolist()
        [1, 0, 0, 2]
    """
    outliers = labels == OUTLIER
    alone = labels.copy()
    alone[outliers] = labels.max(initial=OUTLIER) + 1 + np.arange(outliers.sum())
    return alone
