"""SpCL: contrast with clusters and outliers through one memory of all images.

Ge et al., "Self-paced Contrastive Learning with Hybrid Memory for Domain Adaptive Object
Re-ID", NeurIPS 2020, without a source domain. https://arxiv.org/abs/2006.02713
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Interval


@register_method("SpCL")
class SpCL(ClusterMethod):
    r"""Self-paced contrastive learning with a hybrid memory, unsupervised.

    The memory has a vector of every image. A class is a cluster, or an outlier that is its
    own class; its logit is the mean over its members,

    .. math::
        s_k(f) = \frac{1}{|I_k|} \sum_{j \in I_k} f \cdot v_j, \qquad
            L = -\log \frac{\exp(s_y / \tau)}{\sum_k \exp(s_k / \tau)},

    and an image writes its own row. The memory is filled once, before the first epoch, and
    from then on the images are clustered by their rows and not by new features. (The
    release adds 1e-6 to the probability before the logarithm; this method does not.)

    The self-paced selection of the images that stay in their clusters is the labels' filter
    ``MODEL.SELCON.CLUSTERING.RELIABILITY``. Outliers are sampled if a fraction of the batch
    (``MODEL.SELCON.OUTLIER_RATIO``) is reserved for them; the release samples them like
    clusters of one image.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        temperature: τ, by which similarities are divided.
        bank_momentum: Weight of the old row when the memory is written.
        **options: Those of :class:`ClusterMethod`.
    """

    outliers_are_classes = True

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        temperature: Annotated[float, Interval(0, above=True)] = 0.05,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.temperature = temperature
        self.memory = InstanceMemory(num_images, global_dim, momentum=bank_momentum)

    def clustering_features(self) -> Tensor | None:
        """Return the memory, from the second epoch on."""
        return self.memory.bank if self.prepared else None

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        if not self.prepared:
            self.memory.fill(features)

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with the mean of every class."""
        # The mean of similarities is the similarity to the mean, which must not be scaled.
        means = cluster_means(
            self.memory.bank, self.classes, num_clusters=self.num_classes, normalize=False
        )
        loss = self._contrast(
            embeddings.global_features, means, index, camids, temperature=self.temperature
        )
        return {"loss_class": loss}

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.memory.update(index, features)
