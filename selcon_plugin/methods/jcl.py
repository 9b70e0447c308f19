"""JCL: a bank of centroids and a bank of instances, contrasted with jointly.

Zhang, Li and Ye, "Unsupervised Joint Contrastive Learning for Aerial Person
Re-Identification and Remote Sensing Image Classification", Remote Sensing 16(2) 422, 2024.
https://doi.org/10.3390/rs16020422
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss, instance_contrastive_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Interval


@register_method("JCL")
class JCL(ClusterMethod):
    r"""Joint Contrastive Learning.

    The loss is :math:`L_{cluster} + w L_{instance}`. The first is InfoNCE over the
    clusters' centroids. The second is for samples that are easily confused: InfoNCE over
    the clusters, where the own cluster is as similar as its least similar image in the
    instance bank, and every other as its most similar one. Outliers are in neither.

    Reconstructed from the abstract, which names the two banks, the two levels and what each
    is for: the form of the instance loss, the weight and the update of the banks (every
    sample of the batch, in its order) are this package's. The default weight is a guess:
    short runs on two draws of SyntheticPersons disagreed on 0.25 and 1. The other two parts
    of JCL are not in the method: the filter of single-camera clusters
    (``CLUSTERING.DROP_SINGLE_CAMERA``), and the attention with WaveBlock
    (:func:`selcon_plugin.models.wave_block.insert_wave_blocks`).

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

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with the centroids and with the hardest instances."""
        features, targets = embeddings.global_features, self.labels[index]
        weight = self.camera_weighting(index, targets, camids)
        cluster_loss = cluster_contrastive_loss(
            features,
            self.centroids.bank,
            targets,
            temperature=self.temperature,
            sample_weight=weight,
            focal_gamma=self.focal_gamma,
        )
        instance_loss = instance_contrastive_loss(
            features,
            self.instances.bank,
            self.labels,
            targets,
            temperature=self.temperature,
            own="min",
            others="max",
            sample_weight=weight,
        )
        return {
            "loss_cluster": cluster_loss,
            "loss_instance": self.instance_weight * instance_loss,
        }

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.centroids.update(features, targets)
        self.instances.update(index, features)
