"""RTMem: memories without momentum; a cluster's row is a random image of its last batch.

Yin et al., "A Real-Time Memory Updating Strategy for Unsupervised Person
Re-Identification", IEEE TIP 2023. https://doi.org/10.1109/TIP.2023.3266166
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import sample_to_instance_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Interval
from selcon_plugin.selection import draw_members, step_generator


@register_method("RTMem")
class RTMem(ClusterMethod):
    """Real-time memory.

    There are two losses with a memory each, both written without momentum:

    * Sample to cluster is Cluster Contrast on rows that start an epoch as a random image of
      their cluster, and are overwritten in each step by a random image of the batch.
    * Sample to instance uses the probability of the own cluster in the softmax over all
      images, including outliers, each as its own class; :func:`sample_to_instance_loss`. An
      image's row is its feature when it was last in a batch: the memory is filled once,
      before the first epoch, and kept. Rows of images that are in no batch become outdated.

    The released trainer overwrites the instance loss by the cluster loss, and so trains 2.2
    times the latter. This is considered an error and not reproduced. In the release the
    last image of the batch remains in a cluster's row; here it is sampled, as in the paper.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        temperature: τ of both losses, by which similarities are divided.
        instance_weight: Weight of the sample-to-instance loss.
        seed: Seed of the random images.
        **options: Those of :class:`ClusterMethod`; ``focal_gamma`` is for the cluster loss.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        temperature: Annotated[float, Interval(0, above=True)] = 0.05,
        instance_weight: Annotated[float, Interval(0)] = 1.2,
        seed: Annotated[int, Interval(0)] = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.temperature = temperature
        self.instance_weight = instance_weight
        self.seed = seed
        self.memory = ClusterMemory(torch.zeros(0, global_dim), momentum=0.0)
        self.instances = InstanceMemory(num_images, global_dim, momentum=0.0)

    def _draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sample one image of each cluster; return clusters and positions, ``(P,)``."""
        generator = step_generator(self.seed, self.step)
        clusters, positions = draw_members(labels, 1, generator=generator)
        return clusters, positions.squeeze(1)

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        _, drawn = self._draw(labels)
        self.memory.reset(features[drawn])
        if not self.prepared:
            self.instances.fill(features)

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with all clusters' rows and with all images' rows."""
        features = embeddings.global_features
        cluster = self._contrast(
            features, self.memory.bank, index, camids, temperature=self.temperature
        )
        targets = self.labels[index]
        instance = sample_to_instance_loss(
            features,
            self.instances.bank,
            self.labels,
            targets,
            temperature=self.temperature,
            sample_weight=self.camera_weighting(index, targets, camids),
        )
        return {
            "loss_cluster": cluster,
            "loss_instance": self.instance_weight * instance,
        }

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        clusters, drawn = self._draw(targets)
        self.memory.update(features[drawn], clusters)
        self.instances.update(index, features)
