"""What methods with one memory row per cluster share. Not a method itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import torch
from torch import Tensor

from selcon_plugin.camera_entropy import CAMERA_WEIGHTS, CameraWeighting
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.distributed import gather_batch
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss
from selcon_plugin.methods.base import Method
from selcon_plugin.options import Choice, Interval


class ClusterMethod(Method):
    """Base of methods that contrast global features with banks of clusters.

    A subclass fills its banks in :meth:`_rebuild`, compares with them in :meth:`loss`
    through :meth:`_contrast`, and writes them in :meth:`_write`. It takes ``**options`` and
    hands them on, and so has the options below.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        camera_weight: Weight of a sample by the cameras that see its cluster: ``"batch"``
            (3C), ``"cluster"`` (CALR), ``"multi_camera"`` (JCL) or ``"none"``; see
            :mod:`selcon_plugin.camera_entropy`.
        focal_gamma: Exponent of the focal factor 1 - p on a sample's loss, which raises
            the share of hard samples; 0 for none.
    """

    needs_clusters = True
    uses_parts = False
    default_sampler = "pk_camera"

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        camera_weight: Annotated[str, Choice(CAMERA_WEIGHTS)] = "none",
        focal_gamma: Annotated[float, Interval(0)] = 0.0,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim)
        self.camera_weighting = CameraWeighting(num_images, camera_weight)
        self.focal_gamma = focal_gamma

    @abstractmethod
    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        """Make the banks of new clusters from all images' features ``(M, C)``."""

    @abstractmethod
    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        """Write a batch of all ranks into the banks; the features are float32."""

    @torch.no_grad()
    def prepare(
        self,
        embeddings: Embeddings,
        camids: Tensor | None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        """Keep the labels and rebuild the banks."""
        self._set_labels(pseudo_labels)
        self.camera_weighting.prepare(self.labels, camids)
        self._rebuild(embeddings.global_features, self.labels)
        self._finish_prepare()

    def _contrast(
        self,
        features: Tensor,
        bank: Tensor,
        index: Tensor,
        camids: Tensor | None,
        *,
        temperature: float,
    ) -> Tensor:
        """Contrast a batch with a bank of one row per cluster, weighted as asked for."""
        targets = self.labels[index]
        return cluster_contrastive_loss(
            features,
            bank,
            targets,
            temperature=temperature,
            sample_weight=self.camera_weighting(index, targets, camids),
            focal_gamma=self.focal_gamma,
        )

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write the batch of all ranks into the banks."""
        index = gather_batch(index)
        features = gather_batch(embeddings.global_features.detach().float())
        self._write(index, features, self.labels[index])
        self._finish_update()
