"""HCM, the Hybrid Contrastive Model: hard samples at the levels of clusters and of images.

Si et al., "Hybrid Contrastive Learning for Unsupervised Person Re-Identification", IEEE TMM
2022. https://doi.org/10.1109/TMM.2022.3174414
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss, sample_constraint_loss
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_contrast import InstanceClusterContrast
from selcon_plugin.options import Interval


@register_method("HCM")
class HCM(InstanceClusterContrast):
    """Hybrid Contrastive Model.

    There are two losses with a memory each:

    * The identity level has one row per cluster. The loss is Cluster Contrast with sample
      losses weighted by (1 - p)^γ, where p is the probability of the own cluster. The
      weight is a constant, and small for samples that are already well matched: the dynamic
      contrast loss.
    * The image level has one row per image. The own cluster's least similar image must be
      nearer than the most similar image of any other cluster,
      :func:`sample_constraint_loss`.

    The method is reconstructed from the abstract, which names the two losses and memories
    and their purpose. The form of the factor and of the constraint, the weights and the
    momentum are choices of this package. With ``focal_gamma`` and ``constraint_weight`` 0
    it is Cluster Contrast.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        focal_gamma: γ, exponent of the dynamic factor; 1 to 4 are reasonable, 0 for none.
        constraint_weight: Weight of the loss between an image's hardest positive and
            hardest negative. Large weights let noisy clusters collapse, because their least
            similar images are of other people.
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
        focal_gamma: Annotated[float, Interval(0)] = 1.0,
        constraint_weight: Annotated[float, Interval(0)] = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            num_images, global_dim, num_parts, part_dim, focal_gamma=focal_gamma, **options
        )
        self.constraint_weight = constraint_weight

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast with the clusters; constrain the hardest pair of images."""
        features, targets = embeddings.global_features, self.labels[index]
        weight = self.camera_weighting(index, targets, camids)
        cluster = cluster_contrastive_loss(
            features,
            self.memory.bank,
            targets,
            temperature=self.temperature,
            sample_weight=weight,
            focal_gamma=self.focal_gamma,
            detach_focal=True,
        )
        constraint = sample_constraint_loss(
            features,
            self.instances.bank,
            self.labels,
            index,
            targets,
            temperature=self.temperature,
            sample_weight=weight,
        )
        return {
            "loss_cluster": cluster,
            "loss_constraint": self.constraint_weight * constraint,
        }
