"""DCMIP: discrepant cluster proxies (hard and mean) and proxies of random instances.

Zou et al., "Discrepant and Multi-Instance Proxies for Unsupervised Person
Re-Identification", ICCV 2023. https://openaccess.thecvf.com/content/ICCV2023/html/Zou_Discrepant_and_Multi-Instance_Proxies_for_Unsupervised_Person_Re-Identification_ICCV_2023_paper.html
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.distributed import gather_batch
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import instance_contrastive_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Interval
from selcon_plugin.selection import draw_members, step_generator


@register_method("DCMIP")
class DCMIP(ClusterMethod):
    """Discrepant and multi-instance proxies.

    * Cluster proxies: there is a hard one, moved towards the image of the batch least
      similar to it, and a mean one, moved towards the batch's mean. Both start an epoch as
      the cluster's mean. The loss is (hard + relu(mean - margin)) / 2 of their two InfoNCE
      losses: once the batch is near the means, only the hard proxies have a gradient.
    * Instance proxies, from epoch ``instance_epoch``: these are some random images per
      cluster, overwritten in each step by random images of the batch. The loss is InfoNCE
      over the clusters, where the least similar proxy stands for the own cluster and the
      most similar one for every other.

    The method follows an open re-implementation, whose log reaches the paper's metrics. Its
    variables name the proxies as above, but its rows are ordered such that the margin
    applies to the hard ones. It trains the stages of two networks one after the other, and
    fills the instance proxies from a moving average of the network (decay 0.999), which is
    ``EMA_DECAY`` here. If a cluster has fewer images than proxies, here all of them are
    used, some twice; there they are sampled with replacement.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        temperature: τ, by which similarities are divided.
        bank_momentum: Weight of the old row when a cluster proxy is written.
        margin: Loss of the mean proxies below which they are not trained.
        instance_slots: Instance proxies per cluster.
        instance_weight: Weight of the instance proxies' loss.
        instance_epoch: First epoch with instance proxies, counted from 0; a shorter run
            has no instance proxies.
        seed: Seed of the random images.
        **options: Those of :class:`ClusterMethod`; ``focal_gamma`` is the cluster losses'.
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
        margin: Annotated[float, Interval(0)] = 0.2,
        instance_slots: Annotated[int, Interval(1)] = 16,
        instance_weight: Annotated[float, Interval(0)] = 1.0,
        instance_epoch: Annotated[int, Interval(0)] = 40,
        seed: Annotated[int, Interval(0)] = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.temperature = temperature
        self.margin = margin
        self.instance_slots = instance_slots
        self.instance_weight = instance_weight
        self.instance_epoch = instance_epoch
        self.seed = seed
        empty = torch.zeros(0, global_dim)
        self.hard_memory = ClusterMemory(empty, momentum=bank_momentum, update="hard")
        self.mean_memory = ClusterMemory(empty, momentum=bank_momentum, update="batch_mean")
        # Row c * S + s is slot s of cluster c.
        self.slots = ClusterMemory(empty, momentum=0.0)

    @property
    def _num_slots(self) -> int:
        # If every image is its own class, S slots would be S copies of the data set.
        return 1 if self.instance_level else self.instance_slots

    def _draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sample images of each cluster; return their proxies and their positions."""
        generator = step_generator(self.seed, self.step)
        clusters, drawn = draw_members(labels, self._num_slots, generator=generator)
        slots = torch.arange(self._num_slots, device=labels.device)
        rows = clusters[:, None] * self._num_slots + slots
        return rows.flatten(), drawn.flatten()

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        means = cluster_means(features, labels)
        self.hard_memory.reset(means)
        self.mean_memory.reset(means)
        _, drawn = self._draw(labels)
        self.slots.reset(features[drawn])

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast with both cluster proxies and, in later epochs, the instance proxies."""
        features = embeddings.global_features
        hard, mean = (
            self._contrast(
                features, memory.bank, index, camids, temperature=self.temperature
            )
            for memory in (self.hard_memory, self.mean_memory)
        )
        # relu(mean - margin) is decided for the whole batch, not for each rank's own part.
        beyond = gather_batch(mean.detach()[None]).mean() > self.margin
        losses = {"loss_cluster": 0.5 * (hard + beyond * (mean - self.margin))}
        if self.epoch < self.instance_epoch:
            return losses
        targets = self.labels[index]
        clusters = torch.arange(len(self.mean_memory.bank), device=targets.device)
        instance = instance_contrastive_loss(
            features,
            self.slots.bank,
            clusters.repeat_interleave(self._num_slots),
            targets,
            temperature=self.temperature,
            own="min",
            others="max",
            sample_weight=self.camera_weighting(index, targets, camids),
        )
        return losses | {"loss_instance": self.instance_weight * instance}

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.hard_memory.update(features, targets)
        self.mean_memory.update(features, targets)
        rows, drawn = self._draw(targets)
        self.slots.update(features[drawn], rows)
