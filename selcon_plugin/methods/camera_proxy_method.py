"""Base class of methods with one memory row per camera proxy; not a method itself."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.distance import bank_product
from selcon_plugin.distributed import gather_batch
from selcon_plugin.features import Embeddings
from selcon_plugin.memory.camera_proxy import CameraProxyMemory, camera_sum_weights
from selcon_plugin.methods.base import Method
from selcon_plugin.options import Interval


class CameraProxyMethod(Method):
    """Base of methods that split each cluster by camera.

    Batches contain K images of each of several proxies. The images of unknown camera form
    one proxy of their cluster, see :mod:`selcon_plugin.memory.camera_proxy`. A subclass
    takes ``**options`` and passes them on, and so has the options below.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        temperature: τ, by which similarities are divided.
        bank_momentum: Weight of the old row when the memory is written.
        num_negatives: Number of negatives: the most similar proxies that are no positives.
    """

    needs_clusters = True
    needs_cameras = True
    uses_parts = False
    default_sampler = "proxy"

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        temperature: Annotated[float, Interval(0, above=True)] = 0.07,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.2,
        num_negatives: Annotated[int, Interval(1)] = 50,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim)
        self.temperature = temperature
        self.num_negatives = num_negatives
        self.proxies = CameraProxyMemory(num_images, global_dim, momentum=bank_momentum)

    @torch.no_grad()
    def prepare(
        self,
        embeddings: Embeddings,
        camids: Tensor | None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        """Keep the labels and rebuild the proxies."""
        self.check_cameras(camids)
        assert camids is not None  # or the check would have raised
        self._set_labels(pseudo_labels)
        self.proxies.reset(embeddings.global_features, self.labels, camids)
        self._finish_prepare()

    def _similarity(self, features: Tensor) -> Tensor:
        """Compare features ``(B, C)`` with the proxies: ``(B, P)``."""
        return bank_product(F.normalize(features.float(), dim=1), self.proxies.bank)

    @torch.no_grad()
    def _camera_weights(self, targets: Tensor) -> Tensor:
        """Return weights that turn the images' mean into a sum of the cameras' means."""
        # The means are over the whole batch, across all ranks.
        whole = gather_batch(targets)
        cameras = self.proxies.cameras
        return camera_sum_weights(
            cameras[targets.clamp(min=0)], cameras[whole.clamp(min=0)], whole >= 0
        )

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write the batch of all ranks into the memory."""
        index = gather_batch(index)
        self._write(index, gather_batch(embeddings.global_features.detach().float()))
        self._finish_update()

    def _write(self, index: Tensor, features: Tensor) -> None:
        """Write a batch of all ranks; the features are float32."""
        self.proxies.update(index, features)
