"""O2CAP: camera-aware proxies, associated by clusters (offline) and by batches (online).

Wang et al., "Offline-Online Associated Camera-Aware Proxies for Unsupervised Person
Re-Identification", IEEE TIP 2022. https://arxiv.org/abs/2201.05820
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import (
    inter_camera_loss,
    intra_camera_loss,
    online_association_loss,
)
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.camera_proxy_method import CameraProxyMethod
from selcon_plugin.options import Interval


@register_method("O2CAP")
class O2CAP(CameraProxyMethod):
    """Offline-online associated camera-aware proxies.

    There are two losses from the first step on, each a sum over the batch's cameras of the
    mean over their images, as in :class:`~selcon_plugin.methods.cap.CAP`:

    * The offline loss is CAP's inter-camera loss, whose positives come from the last
      clustering.
    * The online loss finds positives on the batch: in each camera the proxy most similar to
      the image and its own proxy, and of these the most similar ones.

    The paper names these two, and the released training script uses only them. CAP's
    intra-camera loss is in the release but switched off; here it is the option
    ``intra_weight``, where 1 adds it at full weight.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        intra_weight: Weight of the intra-camera loss; 0 leaves it out.
        image_weight: Weight of the image's own similarity when proxies are associated; the
            rest is its proxy's.
        num_positives: Number of proxies of different cameras that the online association
            chooses.
        **options: Those of :class:`CameraProxyMethod`.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        intra_weight: Annotated[float, Interval(0)] = 0.0,
        image_weight: Annotated[float, Interval(0, 1)] = 0.15,
        num_positives: Annotated[int, Interval(1)] = 3,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.intra_weight = intra_weight
        self.image_weight = image_weight
        self.num_positives = num_positives

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with the proxies associated with it."""
        targets = self.proxies.proxies[index]
        similarity = self._similarity(embeddings.global_features)
        weights = self._camera_weights(targets)
        losses = {
            "loss_offline": inter_camera_loss(
                similarity,
                targets,
                self.proxies.clusters,
                temperature=self.temperature,
                num_negatives=self.num_negatives,
                sample_weight=weights,
            ),
            "loss_online": online_association_loss(
                similarity,
                self.proxies.bank,
                targets,
                self.proxies.cameras,
                temperature=self.temperature,
                image_weight=self.image_weight,
                num_positives=self.num_positives,
                num_negatives=self.num_negatives,
                sample_weight=weights,
            ),
        }
        if self.intra_weight:
            losses["loss_intra"] = self.intra_weight * intra_camera_loss(
                similarity,
                targets,
                self.proxies.cameras,
                temperature=self.temperature,
                sample_weight=weights,
            )
        return losses
