"""SelConCluster: the selective contrastive loss on clusters.

The method combines two lines of work. From cluster methods it takes that images are
clustered again in each epoch, batches contain several images of each cluster, and the
memory starts each epoch from new features. From Selective Contrastive Learning it takes
that an image is compared with images and not with cluster centers, its positives are
weighted and are the nearest of its cluster, and its negatives are the hardest images
outside the cluster. Outliers are negatives; if a fraction of the batch is reserved for them
(``OUTLIER_RATIO``) they are also trained, each with itself as the positive.

It is this package's own method; its parts come from Pang et al., 2020
(https://arxiv.org/abs/2010.07608) and Dai et al., 2022 (https://arxiv.org/abs/2103.11568).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch

from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.selective_contrastive import (
    NEGATIVE_CAMERAS,
    SelectiveContrastive,
)
from selcon_plugin.options import Choice, Interval


@register_method("SelConCluster")
class SelConCluster(SelectiveContrastive):
    """Selective contrastive learning on clusters.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Parts S, 0 for none.
        part_dim: Part feature dimension D.
        selection: Ranking of the candidates, as in :class:`SelectiveContrastive`; both
            choices need clusters.
        center_weight: Weight of the cluster's mean in an image's mixture row at the start
            of an epoch; the rest is its own feature.
        num_neighbors: K, images of the cluster that are positives: in most clusters all.
        num_negatives: N, the nearest images outside the cluster.
        self_weight: λ_t, weight of the image's own row.
        neighbor_scale: α, factor on the weight shared by the neighbors; with 1 all weights
            sum to 1.
        negative_cameras: As in :class:`SelectiveContrastive`; by default camera-confounded
            pairs are masked, where cameras are known.
        temperature: τ, by which similarities are divided.
        normalize_parts: Whether the concatenated parts are scaled to unit length.
        warmup_epochs: Epochs without neighbors at the start.
        **options: The other options of :class:`SelectiveContrastive`.
    """

    default_sampler = "pk_camera"

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        selection: Annotated[str, Choice(("jaccard", "cluster"))] = "cluster",
        center_weight: Annotated[float, Interval(0, 1)] = 1.0,
        num_neighbors: Annotated[int, Interval(0)] = 31,
        num_negatives: Annotated[int, Interval(1)] = 3000,
        self_weight: Annotated[float, Interval(0, 1, above=True)] = 0.1,
        neighbor_scale: Annotated[float, Interval(0)] = 1.0,
        negative_cameras: Annotated[str, Choice(NEGATIVE_CAMERAS)] = "unbiased",
        temperature: Annotated[float, Interval(0, above=True)] = 0.05,
        normalize_parts: bool = True,
        warmup_epochs: Annotated[int, Interval(0)] = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            num_images,
            global_dim,
            num_parts,
            part_dim,
            selection=selection,
            num_neighbors=num_neighbors,
            num_negatives=num_negatives,
            self_weight=self_weight,
            neighbor_scale=neighbor_scale,
            negative_cameras=negative_cameras,
            temperature=temperature,
            normalize_parts=normalize_parts,
            warmup_epochs=warmup_epochs,
            **options,
        )
        self.center_weight = center_weight

    @torch.no_grad()
    def prepare(
        self,
        embeddings: Embeddings,
        camids: torch.Tensor | None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        """Fill the ranking banks, and the mixture bank from the new features."""
        super().prepare(embeddings, camids, pseudo_labels)
        own = embeddings.global_features.float()
        if embeddings.part_features is not None:
            # Both views are compared with the bank, so that it starts between them.
            own = own + self.memory.concatenate_parts(embeddings.part_features.float())
        own = torch.nn.functional.normalize(own, dim=1)
        centers = cluster_means(own, self.labels)
        clustered = self.labels >= 0
        start = own.clone()
        start[clustered] = torch.lerp(
            own[clustered], centers[self.labels[clustered]], self.center_weight
        )
        bank = self.memory.mixture_bank
        bank.copy_(torch.nn.functional.normalize(start, dim=1))
