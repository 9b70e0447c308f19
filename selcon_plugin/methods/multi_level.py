"""Multi-level feature contrastive learning: farthest positive, nearest negatives, centroid.

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

    Three losses over the clusters, each InfoNCE, on a memory of cluster centroids and one
    of images:

    * within the class: the own cluster stands for its farthest image, every other cluster
      for the mean over its images.
    * between classes: the own cluster stands for the mean over its images, every other
      cluster for its most confusable image.
    * centroid: Cluster Contrast.

    Reconstructed from the abstract, which names the three. It says "farthest sample" of the
    relation between classes, too; what is farthest there is read as the most confusable
    sample, since to push away what is far already teaches nothing. The weights are this
    package's. The paper also trains on generated images: those are the data's business, not
    the method's. With the first two
    weights 0 it is Cluster Contrast.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        intra_weight: Weight of the loss within the class: own farthest image, others' mean.
            Large ones let noisy clusters collapse: their farthest images are of other
            people.
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
