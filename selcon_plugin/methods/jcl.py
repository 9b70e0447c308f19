"""JCL: joint contrast with a bank of centroids and a bank of instances.

Zhang, Li and Ye, "Unsupervised Joint Contrastive Learning for Aerial Person
Re-Identification and Remote Sensing Image Classification", Remote Sensing 16(2) 422, 2024.
https://doi.org/10.3390/rs16020422
"""

from __future__ import annotations

from torch import Tensor

from selcon_plugin.losses import instance_contrastive_loss
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.centroid_instance_method import CentroidInstanceMethod


@register_method("JCL")
class JCL(CentroidInstanceMethod):
    r"""Joint Contrastive Learning.

    The loss is :math:`L_{cluster} + w L_{instance}`. The first term is InfoNCE over the
    clusters' centroids. The second is for samples that are easily confused: it is InfoNCE
    over the clusters, where the similarity to the own cluster is that to its least similar
    image in the instance bank, and the similarity to every other cluster is that to its
    most similar image. Outliers are in neither term.

    The method is reconstructed from the abstract, which names the two banks, the two levels
    and their purposes. The form of the instance loss, the weight and the update of the
    banks (with every sample of the batch, in its order) are choices of this package. The
    default weight is a guess: short runs on two seeds of SyntheticPersons disagreed on 0.25
    and 1. Two other parts of JCL are not in the method: the filter of single-camera
    clusters (``CLUSTERING.DROP_SINGLE_CAMERA``), and the attention with WaveBlock
    (:func:`selcon_plugin.models.wave_block.insert_wave_blocks`).

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        **options: Those of :class:`CentroidInstanceMethod`.
    """

    def _instance_loss(
        self, features: Tensor, index: Tensor, targets: Tensor, weight: Tensor | None
    ) -> Tensor:
        return instance_contrastive_loss(
            features,
            self.instances.bank,
            self.labels,
            targets,
            temperature=self.temperature,
            own="min",
            others="max",
            sample_weight=weight,
        )
