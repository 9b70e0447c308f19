"""Base class of methods with centroids and an instance bank; not a method itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Interval


class CentroidInstanceMethod(ClusterMethod):
    r"""Base of methods whose loss is :math:`L_{cluster} + w L_{instance}`.

    The first term is InfoNCE over the clusters' centroids. A subclass defines the second,
    on a bank with a row per image, in :meth:`_instance_loss`. Every sample of a batch
    writes its cluster's centroid and its own row.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        temperature: τ, by which similarities are divided.
        bank_momentum: Weight of the old row when a bank is written.
        instance_weight: Weight w of the instance loss.
        **options: Those of :class:`ClusterMethod`; the focal factor is on the cluster loss.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        temperature: Annotated[float, Interval(0, above=True)] = 0.05,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.1,
        instance_weight: Annotated[float, Interval(0)] = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.temperature = temperature
        self.instance_weight = instance_weight
        self.centroids = ClusterMemory(torch.zeros(0, global_dim), momentum=bank_momentum)
        self.instances = InstanceMemory(num_images, global_dim, momentum=bank_momentum)

    @abstractmethod
    def _instance_loss(
        self, features: Tensor, index: Tensor, targets: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Contrast a batch with the bank of images.

        Args:
            features: Features of the batch, ``(B, C)``.
            index: Index of each training image, int64 ``(B,)``.
            targets: Cluster of each image, int64 ``(B,)``, -1 for an outlier.
            weight: Weight of each image, ``(B,)``, or None for equal weights.

        Returns:
            A scalar.
        """

    def _cluster_weight(self, index: Tensor, weight: Tensor | None) -> Tensor | None:
        """Return the weights of the cluster loss for the samples' weights ``(B,)``."""
        return weight

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        self.centroids.reset(cluster_means(features, labels))
        self.instances.fill(features)

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with the centroids and with the bank of images."""
        features, targets = embeddings.global_features, self.labels[index]
        weight = self.camera_weighting(index, targets, camids)
        cluster_loss = cluster_contrastive_loss(
            features,
            self.centroids.bank,
            targets,
            temperature=self.temperature,
            sample_weight=self._cluster_weight(index, weight),
            focal_gamma=self.focal_gamma,
        )
        instance_loss = self._instance_loss(features, index, targets, weight)
        return {
            "loss_cluster": cluster_loss,
            "loss_instance": self.instance_weight * instance_loss,
        }

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.centroids.update(features, targets)
        self.instances.update(index, features)
