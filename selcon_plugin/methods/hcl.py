"""HCL: contrast with the images of a cluster and with its centroid.

Sun, Li and Li, "Hybrid Contrastive Learning with Cluster Ensemble for Unsupervised Person
Re-identification", ACPR 2021. https://arxiv.org/abs/2201.11995
"""

from __future__ import annotations

from torch import Tensor

from selcon_plugin.losses import priority_contrastive_loss
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.centroid_instance_method import CentroidInstanceMethod


@register_method("HCL")
class HCL(CentroidInstanceMethod):
    r"""Hybrid Contrastive Learning.

    The loss is :math:`L_{cluster} + w L_{instance}`. The first term is InfoNCE over the
    clusters' centroids. The second contrasts an image with all images of the instance bank:
    it is the mean of -log softmax over those of its cluster, including the image itself.
    Outliers are not trained; in the instance bank they are negatives.

    The method is reconstructed from the abstract, which names the two levels. The form of
    the instance loss, the weight and the update of the banks (with every sample of the
    batch, in its order) are choices of this package. The default weight is a guess, as in
    :class:`~selcon_plugin.methods.jcl.JCL`.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        **options: Those of :class:`CentroidInstanceMethod`.
    """

    def _pair_priority(self, index: Tensor, targets: Tensor) -> Tensor:
        """Return the priority of all images as positives, ``(B, M)``; any for outliers."""
        return (targets[:, None] == self.labels).float()

    def _instance_loss(
        self, features: Tensor, index: Tensor, targets: Tensor, weight: Tensor | None
    ) -> Tensor:
        clustered = (targets >= 0)[:, None]
        return priority_contrastive_loss(
            features,
            self.instances.bank,
            self._pair_priority(index, targets) * clustered,
            temperature=self.temperature,
            sample_weight=weight,
        )
