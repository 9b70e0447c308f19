"""Cluster Contrast: one memory row per cluster, rebuilt after every clustering.

Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022.
https://arxiv.org/abs/2103.11568
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Choice, Interval


@register_method("ClusterContrast")
class ClusterContrast(ClusterMethod):
    """Cluster Contrast: InfoNCE over the clusters' memory rows.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        temperature: τ, by which similarities are divided.
        bank_momentum: Weight of the old row when the memory is written.
        cluster_update: Samples that write their cluster's row: ``"mean"`` for all of the
            batch, one after the other; ``"hard"`` for the one least similar to the row.
        **options: Those of :class:`ClusterMethod`.
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
        cluster_update: Annotated[str, Choice(("mean", "hard"))] = "mean",
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.temperature = temperature
        self.memory = ClusterMemory(
            torch.zeros(0, global_dim),
            momentum=bank_momentum,
            update=cluster_update,  # type: ignore[arg-type]
        )

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        self.memory.reset(cluster_means(features, labels))

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with all clusters' rows."""
        loss = self._contrast(
            embeddings.global_features,
            self.memory.bank,
            index,
            camids,
            temperature=self.temperature,
        )
        return {"loss_cluster": loss}

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.memory.update(features, targets)


class InstanceClusterContrast(ClusterContrast):
    """Base of methods that add an instance memory to Cluster Contrast; not a method itself.

    Every sample of a batch writes its own row.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        **options: Those of :class:`ClusterContrast`; the momentum is that of both memories.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.instances = InstanceMemory(
            num_images, global_dim, momentum=self.memory.momentum
        )

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        super()._rebuild(features, labels)
        self.instances.fill(features)

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        super()._write(index, features, targets)
        self.instances.update(index, features)
