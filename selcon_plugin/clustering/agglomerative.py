"""Agglomerative clustering with average linkage on sparse Jaccard distances.

The two clusters with the smallest average distance are merged repeatedly until no pair is
closer than a threshold: hierarchical clustering as in HCT (Zeng et al., CVPR 2020).

On synthetic features the default threshold of 0.8 gave about as many clusters as DBSCAN
with an eps of 0.6, the most common setting in the literature. With every option "auto" it
is the clustering of ``selcon cluster``, for any number of images per person.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from torch import Tensor

from selcon_plugin.clustering.auto_threshold import (
    check_hint,
    chosen_threshold,
    images_for,
)
from selcon_plugin.clustering.base import Labeler, register_labeler
from selcon_plugin.clustering.copies import distances_with_copies
from selcon_plugin.clustering.linkage import average_linkage
from selcon_plugin.clustering.multi_scale import SCALES, multi_scale_distance
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels
from selcon_plugin.options import Interval

_SMALLEST_CLUSTER = 2


@register_labeler("Agglomerative")
class AgglomerativeLabeler(Labeler):
    """Average linkage on the k-reciprocal Jaccard distance.

    ``measured["threshold"]`` holds the threshold that was used.

    Args:
        threshold: Largest average Jaccard distance at which clusters are merged, or "auto"
            for unsupervised selection; see
            :func:`~selcon_plugin.clustering.auto_threshold.choose_cut`.
        min_cluster_size: Images in the smallest cluster; images of smaller ones are
            outliers. "auto" means 2.
        k1: Neighbors in the Jaccard distance; "auto" means the mean of the distances at 4,
            9 and 20 neighbors, see
            :func:`~selcon_plugin.clustering.multi_scale.multi_scale_distance`.
        k2: Neighbors averaged by query expansion, 1 for none; "auto" means a fifth of k1.
        images_per_person: About how many images show the same person, m, if it is known:
            the threshold "auto" is then 1 - 1/m. "auto" means unknown.
    """

    def __init__(
        self,
        *,
        threshold: Annotated[float | Literal["auto"], Interval(0, 1, above=True)] = 0.8,
        min_cluster_size: Annotated[int | Literal["auto"], Interval(1)] = 4,
        k1: Annotated[int | Literal["auto"], Interval(1)] = 30,
        k2: Annotated[int | Literal["auto"], Interval(1)] = 6,
        images_per_person: Annotated[float | Literal["auto"], Interval(1)] = "auto",
    ) -> None:
        check_hint(images_per_person, {"threshold": threshold})
        self.threshold = threshold
        self.min_cluster_size = min_cluster_size
        self.k1 = k1
        self.k2 = k2
        self.images_per_person = images_per_person

    def num_neighbors(self, num_images: int) -> int:
        """Return the number of neighbors searched per image.

        Args:
            num_images: Number of images M.
        """
        return SCALES[-1] if self.k1 == "auto" else self.k1

    def smallest_cluster(self, found: PseudoLabels) -> int:
        """Return the option min_cluster_size, or its "auto" value, at least 2.

        Args:
            found: Output of :meth:`cluster`.
        """
        return max(_SMALLEST_CLUSTER, self._smallest)

    @property
    def _smallest(self) -> int:
        size = self.min_cluster_size
        return _SMALLEST_CLUSTER if size == "auto" else size

    def cluster(self, features: Tensor) -> PseudoLabels:
        """Cluster images of unknown cameras; see :meth:`cluster_seen`."""
        return self.cluster_seen(features, None)

    def cluster_seen(self, features: Tensor, camids: Tensor | None) -> PseudoLabels:
        """Compute the distances, merge clusters, choose the threshold, drop small ones.

        Args:
            features: Unit vectors ``(M, C)``.
            camids: Camera of each image, -1 where unknown, ``(M,)``, or None, for the
                choice of the threshold.

        Returns:
            The labels and the graph, which stores every distance below 1; ``threshold`` in
            ``measured``, and with "auto" ``images_per_person``.
        """
        distance, measured = self._distance(features), {}
        if self.threshold == "auto":
            hierarchy = average_linkage(distance)
            threshold = chosen_threshold(
                hierarchy, features, camids, images_per_person=self.images_per_person
            )
            measured["images_per_person"] = images_for(threshold)
        else:
            threshold = self.threshold
            hierarchy = average_linkage(distance, threshold)
        labels = hierarchy.cut(threshold)
        labels[np.bincount(labels)[labels] < self._smallest] = OUTLIER
        measured["threshold"] = threshold
        return PseudoLabels.numbered(labels, distance=distance, measured=measured)

    def _distance(self, features: Tensor) -> Any:
        if self.k1 == "auto":
            return multi_scale_distance(features)
        k2 = max(1, round(self.k1 / 5)) if self.k2 == "auto" else self.k2
        return distances_with_copies(features, k1=self.k1, k2=k2)
