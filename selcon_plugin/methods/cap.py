"""CAP, camera-aware proxies: clusters split by camera, with intra- and inter-camera losses.

Wang et al., "Camera-aware Proxies for Unsupervised Person Re-Identification", AAAI 2021.
https://arxiv.org/abs/2012.10674
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import inter_camera_loss, intra_camera_loss
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.camera_proxy_method import CameraProxyMethod
from selcon_plugin.options import Interval


@register_method("CAP")
class CAP(CameraProxyMethod):
    """Camera-aware proxies.

    Within a camera an image is discriminated from the other clusters that this camera sees;
    the appearance of the camera does not help with that. Later, when clusters are good, all
    proxies of its cluster are positives against the most similar proxies of others:

        loss = sum over the batch's cameras c of
               mean over the images of c of (intra + inter_weight · inter)

    As in the release the sum is over cameras and not divided by their number, so that the
    loss of a batch from six cameras is about six times that of one. The cameras are those
    of the whole batch across processes, but of each micro-batch separately.

    With one camera this is Cluster Contrast at the same temperature and momentum, until the
    inter-camera loss is added. An image of unknown camera has no intra-camera loss.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        inter_weight: Weight of the inter-camera loss.
        inter_epoch: First epoch with the inter-camera loss, counted from 0.
        **options: Those of :class:`CameraProxyMethod`.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        inter_weight: Annotated[float, Interval(0)] = 0.5,
        inter_epoch: Annotated[int, Interval(0)] = 5,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.inter_weight = inter_weight
        self.inter_epoch = inter_epoch

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with the proxies of its camera, later with all."""
        targets = self.proxies.proxies[index]
        similarity = self._similarity(embeddings.global_features)
        weights = self._camera_weights(targets)
        losses = {
            "loss_intra": intra_camera_loss(
                similarity,
                targets,
                self.proxies.cameras,
                temperature=self.temperature,
                sample_weight=weights,
            )
        }
        if self.epoch >= self.inter_epoch:
            losses["loss_inter"] = self.inter_weight * inter_camera_loss(
                similarity,
                targets,
                self.proxies.clusters,
                temperature=self.temperature,
                num_negatives=self.num_negatives,
                sample_weight=weights,
            )
        return losses
