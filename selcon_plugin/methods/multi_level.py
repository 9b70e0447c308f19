"""Multi-level feature contrast: farthest positives, nearest negatives and centroids.

Peng et al., "Unsupervised Person Re-identification with Multi-Level Feature Contrastive
Learning", 2023. https://openalex.org/W4385299086
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import instance_contrastive_loss
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_contrast import InstanceClusterContrast
from selcon_plugin.options import Interval


@register_method("MultiLevel")
class MultiLevel(InstanceClusterContrast):
    """Multi-level feature contrastive learning.

    There are three losses over the clusters, each InfoNCE, on a memory of cluster centroids
    and one of images:

    * Within the class, the own cluster is represented by its farthest image and every other
      cluster by the mean over its images.
    * Between classes, the own cluster is represented by the mean over its images and every
      other cluster by its most confusable image.
    * The loss of the centroids is Cluster Contrast.

    The method is reconstructed from the abstract, which names the three. It says "farthest
    sample" for the relation between classes as well; this is interpreted as the most
    confusable sample, because pushing away what is already far teaches nothing. The weights
    are choices of this package. The paper also trains on generated images, which belong to
    the data and not to the method. With the first two weights 0 it is Cluster Contrast.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        intra_weight: Weight of the loss within the class: own farthest image, others' mean.
            Large weights let noisy clusters collapse, because their farthest images are of
            other people.
        inter_weight: Weight of the loss between classes: own mean, others' most confusable
            image.
        centroid_weight: Weight of the centroids' loss.
        **options: Those of :class:`InstanceClusterContrast`; temperature and momentum are
            those of both memories.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        intra_weight: Annotated[float, Interval(0)] = 0.2,
        inter_weight: Annotated[float, Interval(0)] = 0.5,
        centroid_weight: Annotated[float, Interval(0)] = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.intra_weight = intra_weight
        self.inter_weight = inter_weight
        self.centroid_weight = centroid_weight

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast with farthest positives, most confusable negatives and centroids."""
        centroid = super().loss(embeddings, index, camids)["loss_cluster"]
        targets = self.labels[index]
        arguments = (embeddings.global_features, self.instances.bank, self.labels, targets)
        settings = {
            "temperature": self.temperature,
            "sample_weight": self.camera_weighting(index, targets, camids),
        }
        intra = instance_contrastive_loss(*arguments, own="min", others="mean", **settings)
        inter = instance_contrastive_loss(*arguments, own="mean", others="max", **settings)
        return {
            "loss_intra": self.intra_weight * intra,
            "loss_inter": self.inter_weight * inter,
            "loss_cluster": self.centroid_weight * centroid,
        }
