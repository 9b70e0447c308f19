"""Base class of methods with banks of clusters; not a method itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.clustering.pseudo_labels import outliers_as_singletons
from selcon_plugin.distributed import gather_batch
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss
from selcon_plugin.losses.camera_weights import CAMERA_WEIGHTS, CameraWeighting
from selcon_plugin.methods.base import Method
from selcon_plugin.options import Choice, Interval


class ClusterMethod(Method):
    """Base of methods that contrast global features with banks of clusters.

    A subclass fills its banks in :meth:`_rebuild`, compares with them in :meth:`loss`
    through :meth:`_contrast`, and writes them in :meth:`_write`. It takes ``**options`` and
    passes them on, and so has the options below.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        camera_weight: Weight of a sample by the cameras that see its cluster: ``"batch"``
            (3C), ``"cluster"`` (CALR), ``"multi_camera"`` (JCL) or ``"none"``; see
            :mod:`selcon_plugin.losses.camera_weights`.
        focal_gamma: Exponent of the focal factor 1 - p on a sample's loss, which raises the
            relative weight of hard samples; 0 for none.

    Attributes:
        outliers_are_classes: Whether each outlier is its own class, numbered after the
            clusters. Outliers are sampled if a fraction of the batch (``OUTLIER_RATIO``) is
            reserved for them.
        classes: Class of each image, int64 ``(M,)``: its cluster; for an outlier -1 or, if
            outliers are classes, its own class.
        num_classes: Total number of classes.
    """

    needs_clusters = True
    uses_parts = False
    default_sampler = "pk_camera"
    outliers_are_classes: ClassVar[bool] = False

    classes: Tensor

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
        # This buffer is not part of the state, because it follows from the labels.
        self.register_buffer("classes", self.labels.clone(), persistent=False)
        self.num_classes = 0
        self.camera_weighting = CameraWeighting(num_images, camera_weight)
        self.focal_gamma = focal_gamma

    @abstractmethod
    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        """Rebuild the banks for new classes ``(M,)`` from all features ``(M, C)``."""

    @abstractmethod
    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        """Write a batch of all ranks into the banks; the features are float32."""

    def _read_labels(self) -> None:
        super()._read_labels()
        if self.outliers_are_classes:
            classes = torch.from_numpy(outliers_as_singletons(self.labels.cpu().numpy()))
            self.classes.copy_(classes)
        else:
            self.classes.copy_(self.labels)
        self.num_classes = int(self.classes.max()) + 1

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
        self._rebuild(embeddings.global_features, self.classes)
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
        """Contrast a batch with a bank of one row per class, with the options' weights."""
        return cluster_contrastive_loss(
            features,
            bank,
            self.classes[index],
            temperature=temperature,
            # An outlier has no cluster that determines its weight: it is 1.
            sample_weight=self.camera_weighting(index, self.labels[index], camids),
            focal_gamma=self.focal_gamma,
        )

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write the batch of all ranks into the banks."""
        index = gather_batch(index)
        features = gather_batch(embeddings.global_features.detach().float())
        self._write(index, features, self.classes[index])
        self._finish_update()
