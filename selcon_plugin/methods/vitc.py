"""ViTC-UReID: memories of identities and of their camera proxies, for a ViT backbone.

Pham et al., "ViTC-UReID", Journal of Computer Science and Cybernetics, 2025.
https://doi.org/10.15625/1813-9663/23018
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss, inter_camera_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.camera_proxy_method import CameraProxyMethod
from selcon_plugin.options import Interval


@register_method("ViTC")
class ViTC(CameraProxyMethod):
    """Identity memory and camera-proxy memory with one contrastive loss each.

    The method is reconstructed from the abstract; neither the paper's text nor its code was
    available. The abstract specifies clusters by DBSCAN, each split by camera; a memory of
    the clusters' centers and one of the cameras' centers within them; a contrastive loss
    for each; that outliers are kept; and a Vision Transformer. The rest follows
    camera-aware proxies: every sample is contrasted with all rows of the identity memory,
    and in the proxy memory with all proxies of its cluster as positives and the most
    similar others as negatives; so do momentum, temperature and weights. Both losses are
    means over the batch. Modeling of single tokens, which the paper may add, is left out.

    Nothing here depends on the backbone: choose a ViT in the config. Outliers are kept by
    ``MODEL.SELCON.CLUSTERING.OUTLIERS: singleton``, which makes each its own identity; with
    ``drop`` they are left out as in other methods.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        proxy_weight: Weight of the loss over the camera proxies.
        **options: Those of :class:`CameraProxyMethod`; temperature and momentum apply to
            both memories.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        proxy_weight: Annotated[float, Interval(0)] = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.proxy_weight = proxy_weight
        self.identities = ClusterMemory(
            torch.zeros(0, global_dim), momentum=self.proxies.memory.momentum
        )

    @torch.no_grad()
    def prepare(
        self,
        embeddings: Embeddings,
        camids: Tensor | None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        """Keep the labels and rebuild both memories."""
        super().prepare(embeddings, camids, pseudo_labels)
        self.identities.reset(cluster_means(embeddings.global_features, self.labels))

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with identities and with camera proxies."""
        features = embeddings.global_features
        identity = cluster_contrastive_loss(
            features,
            self.identities.bank,
            self.labels[index],
            temperature=self.temperature,
        )
        proxy = inter_camera_loss(
            self._similarity(features),
            self.proxies.proxies[index],
            self.proxies.clusters,
            temperature=self.temperature,
            num_negatives=self.num_negatives,
        )
        return {"loss_identity": identity, "loss_proxy": self.proxy_weight * proxy}

    def _write(self, index: Tensor, features: Tensor) -> None:
        super()._write(index, features)
        self.identities.update(features, self.labels[index])
