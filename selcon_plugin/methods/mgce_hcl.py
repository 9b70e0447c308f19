"""MGCE-HCL: HCL whose positive pairs are weighted by the agreement of several clusterings.

Sun, Li and Li, "Hybrid Contrastive Learning with Cluster Ensemble for Unsupervised Person
Re-identification", ACPR 2021. https://arxiv.org/abs/2201.11995
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selcon_plugin.clustering import OUTLIER, PseudoLabels, cluster_agreement
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.hcl import HCL


@register_method("MGCEHCL")
class MGCEHCL(HCL):
    r"""Hybrid contrastive learning with a multi-granularity clustering ensemble.

    The labeler ``Ensemble`` clusters the same features at three granularities. The priority
    :math:`a_{ij}` of two images is the fraction of the clusterings in which they are in the
    same cluster, one of 0, 1/3, 2/3 and 1; an image's priority for itself is 1. The
    instance loss of :class:`HCL` becomes the mean of -log softmax over all images, weighted
    by :math:`a_{ij}`; the cluster loss of an image is multiplied by the mean of
    :math:`a_{ij}` over its cluster, including the image itself. If the three clusterings
    are the same, this is HCL. Images that are in the same cluster in only one clustering
    are positives of weight 1/3 even if the joint clusters separate them.

    The method is reconstructed from the abstract, which states that the ensemble assigns
    priorities to pairs and that both losses are weighted by them; how they are weighted is
    a choice of this package.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        **options: Those of :class:`HCL`.

    Attributes:
        labelings: The clusterings of the last :meth:`prepare`, int64 ``(T, M)``.
        cluster_priority: Mean priority of each image in its cluster, float32 ``(M,)``.
    """

    labelings: Tensor
    cluster_priority: Tensor

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        none = torch.empty(0, num_images, dtype=torch.int64)
        self.register_buffer("labelings", none)
        self.register_buffer("cluster_priority", torch.zeros(num_images))

    def _set_labels(self, pseudo_labels: PseudoLabels | None) -> PseudoLabels:
        given = super()._set_labels(pseudo_labels)
        # Where every image is its own class, each clustering is.
        labelings = given.labels[None] if given.instance_level else given.labelings
        if labelings is None:
            raise ValueError(
                f"{type(self).__name__} needs the clusterings of an ensemble, and the "
                "labeler gave none: set MODEL.SELCON.CLUSTERING.LABELER to Ensemble"
            )
        self.labelings = labelings.to(self.labels.device)
        agreement = cluster_agreement(labelings.numpy(), given.labels.numpy())
        others = torch.from_numpy(agreement)  # without the image itself, which adds 1
        inside = given.labels != OUTLIER
        size = torch.ones_like(others)
        size[inside] = given.sizes[given.labels[inside]].to(size)
        self.cluster_priority.copy_((others * (size - 1) + 1) / size)
        return given

    def _pair_priority(self, index: Tensor, targets: Tensor) -> Tensor:
        shared = torch.zeros(len(index), self.num_images, device=index.device)
        for labeling in self.labelings:  # three
            own = labeling[index][:, None]
            shared += (own == labeling) & (own != OUTLIER)
        priority = shared / len(self.labelings)
        return priority.scatter_(1, index[:, None], 1.0)

    def _cluster_weight(self, index: Tensor, weight: Tensor | None) -> Tensor:
        priority = self.cluster_priority[index]
        return priority if weight is None else priority * weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # There is one clustering in an epoch in which every image is its own class.
        loaded = state_dict.get(prefix + "labelings")
        if loaded is not None and loaded.shape[1:] == self.labelings.shape[1:]:
            self.labelings = self.labelings.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
