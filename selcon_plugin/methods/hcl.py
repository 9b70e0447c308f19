"""HCL: contrast with the images of a cluster and with its centroid.

Sun, Li and Li, "Hybrid Contrastive Learning with Cluster Ensemble for Unsupervised Person
Re-identification", ACPR 2021. https://arxiv.org/abs/2201.11995
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss, priority_contrastive_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Interval


@register_method("HCL")
class HCL(ClusterMethod):
    r"""Hybrid Contrastive Learning.

    The loss is :math:`L_{cluster} + w L_{instance}`. The first is InfoNCE over the
    clusters' centroids. The second contrasts an image with all images of the instance bank:
    the mean of -log softmax over those of its cluster, itself included. Outliers are not
    trained; in the instance bank they are negatives.

    Reconstructed from the abstract, which names the two levels: the form of the instance
    loss, the weight and the update of the banks (every sample of the batch, in its order)
    are this package's. The default weight is a guess, as in
    :class:`~selcon_plugin.methods.jcl.JCL`.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        temperature: τ, divides the similarities.
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

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        self.centroids.reset(cluster_means(features, labels))
        self.instances.fill(features)

    def _pair_priority(self, index: Tensor, targets: Tensor) -> Tensor:
        """Weigh all images as positives of a batch, ``(B, M)``; outliers get any weight."""
        return (targets[:, None] == self.labels).float()

    def _cluster_weight(self, index: Tensor, weight: Tensor | None) -> Tensor | None:
        """Turn the samples' weights, ``(B,)`` or None, into those of the cluster loss."""
        return weight

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with the centroids and with all instances."""
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
        clustered = (targets >= 0)[:, None]
        instance_loss = priority_contrastive_loss(
            features,
            self.instances.bank,
            self._pair_priority(index, targets) * clustered,
            temperature=self.temperature,
            sample_weight=weight,
        )
        return {
            "loss_cluster": cluster_loss,
            "loss_instance": self.instance_weight * instance_loss,
        }

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.centroids.update(features, targets)
        self.instances.update(index, features)
