"""CACL: a second, gray view regularizes the color view.

Clusters of images are to a large extent clusters of clothing colors. CACL embeds every
batch a second time in gray, learns clusters in that view as well, and pulls the color view
towards it: shape and texture have to carry the information that only color carried before.

Li et al., "Cluster-guided Asymmetric Contrastive Learning for Unsupervised Person
Re-Identification", TIP 2022. https://arxiv.org/abs/2106.07846
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.distributed import gather_batch
from selcon_plugin.features import Embeddings
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Interval


def gray_images(images: Tensor) -> Tensor:
    """Convert images to gray: their luma (ITU-R BT.601) in all three channels.

    Args:
        images: RGB, shape ``(B, 3, H, W)``, any scale.

    Returns:
        Float32, the same shape; gray images are unchanged.
    """
    red, green, blue = images.float().unbind(dim=1)
    luma = red + 0.587 * (green - red) + 0.114 * (blue - red)
    return luma[:, None].expand_as(images)


@register_method("CACL")
class CACL(ClusterMethod):
    """Cluster-guided asymmetric contrast of a color and a gray view, with one network.

    This is a reconstruction with one network. The paper trains two, one for each view, and
    applies a projector to the color features before they are compared; here one network
    embeds both views, and the features are compared as they are. The paper's filter of
    clusters is not part of this method.

    Each view has a memory of one row per image, which is written with the view's own
    features and kept from epoch to epoch; the color memory is clustered. A cluster's logit
    is the mean of the similarities to its members. The loss is the sum of

    * the contrast of each view with the clusters in its own memory, with a focal factor;
    * the mean negative cosine between the color feature and the image's gray feature;
    * the mean negative cosine between the color feature and its cluster's gray mean.

    The gray side of the last two is a constant: only the color view follows. Both memories
    start from the color features of the first extraction, because there are no others; the
    gray rows then follow the gray view. In the paper outliers are clusters of one image:
    ``MODEL.SELCON.CLUSTERING.OUTLIERS: singleton``. Without that setting they are not
    contrasted, and only follow their gray feature.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        temperature: τ, by which similarities are divided.
        bank_momentum: Weight of the old row when a memory is written.
        gray_feature_weight: Weight of the loss between the color feature and the image's
            gray feature.
        gray_cluster_weight: Weight of the loss between the color feature and the cluster's
            gray mean.
        focal_gamma: Exponent of the focal factor 1 - p on a sample's loss, which raises the
            relative weight of hard samples; 0 for none.
        **options: The other options of :class:`ClusterMethod`.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        temperature: Annotated[float, Interval(0, above=True)] = 0.05,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.2,
        gray_feature_weight: Annotated[float, Interval(0)] = 1.0,
        gray_cluster_weight: Annotated[float, Interval(0)] = 1.0,
        focal_gamma: Annotated[float, Interval(0)] = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(
            num_images,
            global_dim,
            num_parts,
            part_dim,
            focal_gamma=focal_gamma,
            **options,
        )
        self.temperature = temperature
        self.gray_feature_weight = gray_feature_weight
        self.gray_cluster_weight = gray_cluster_weight
        self.memory = InstanceMemory(num_images, global_dim, momentum=bank_momentum)
        self.gray_memory = InstanceMemory(num_images, global_dim, momentum=bank_momentum)

    def make_views(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the gray view of a batch."""
        return (gray_images(images),)

    def clustering_features(self) -> Tensor | None:
        """Return the color memory, once it is filled."""
        return self.memory.bank if self.prepared else None

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        if not self.prepared:
            self.memory.fill(features)
            self.gray_memory.fill(features)

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast both views, and pull the color view towards the gray one."""
        if len(views) != 1:
            raise ValueError(
                "CACL compares the color view of a batch with one gray view, got "
                f"{len(views)} further views: pass to loss() the embeddings of the views "
                "that make_views() returns"
            )
        color, gray = embeddings.global_features, views[0].global_features
        self.remember(index, gray.detach())
        color_means = cluster_means(self.memory.bank, self.labels, normalize=False)
        gray_means = cluster_means(self.gray_memory.bank, self.labels, normalize=False)
        tau = self.temperature
        loss_color = self._contrast(color, color_means, index, camids, temperature=tau)
        loss_gray = self._contrast(gray, gray_means, index, camids, temperature=tau)
        targets = self.labels[index]
        inside = targets >= 0
        to_feature = F.cosine_similarity(color.float(), gray.detach().float())
        to_cluster = F.cosine_similarity(color.float(), gray_means[targets])
        to_cluster = (to_cluster * inside).sum() / inside.sum().clamp(min=1)
        return {
            "loss_color": loss_color,
            "loss_gray": loss_gray,
            "loss_gray_feature": -self.gray_feature_weight * to_feature.mean(),
            "loss_gray_cluster": -self.gray_cluster_weight * to_cluster,
        }

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write both views of the batch of all ranks into their memories.

        Raises:
            RuntimeError: If no loss was computed for this batch.
        """  # noqa: DOC502  (raised by the functions called here)
        gray = torch.cat(self.recall(index))
        super().update(index, embeddings)
        self.gray_memory.update(gather_batch(index), gather_batch(gray.float()))

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.memory.update(index, features)
