"""Network in training: backbone, head, teacher, and the method with its banks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from selcon_plugin.engine.described import DescribedNetwork
from selcon_plugin.engine.supervision import StepCheck, check_paths
from selcon_plugin.features import Embeddings, check_parts_fit, fused_feature, most_parts
from selcon_plugin.methods import Method, method_class
from selcon_plugin.models.backbone import ModelBackbone
from selcon_plugin.models.ema import EMATeacher
from selcon_plugin.models.feature_map import as_feature_map, infer_feature_shape
from selcon_plugin.models.ghost_norm import convert_ghost_batch_norm
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.wave_block import WaveBlockKind, insert_wave_blocks

logger = logging.getLogger(__name__)


def usable_parts(
    backbone: nn.Module,
    input_size: tuple[int, int],
    method: str,
    num_parts: int | str,
    embedding_dim: int = 0,
) -> tuple[int, int]:
    """Return the channels of a backbone's feature map and the number of usable parts.

    Args:
        backbone: Maps images to a feature map.
        input_size: Height and width of the images.
        method: Registered name of the method.
        num_parts: Requested number of parts; ``"auto"`` for what fits.
        embedding_dim: Dimension of the global feature; 0 for that of the backbone.

    Returns:
        Channels F, and the number of parts: 0 if the method does not use parts, and, with a
        warning, if the backbone returns one vector.
    """
    channels, rows, _ = infer_feature_shape(backbone, input_size)
    if isinstance(num_parts, str):
        uses_parts = method_class(method).uses_parts
        num_parts = most_parts(rows, embedding_dim or channels) if uses_parts else 0
    if not method_class(method).uses_parts and num_parts:
        logger.info("%s does not use parts: the head has none", method)
        num_parts = 0
    if rows == 1 and num_parts:
        logger.warning("The backbone returns no feature map: training without parts")
        num_parts = 0
    check_parts_fit(rows, num_parts)
    return channels, num_parts


@dataclass(frozen=True)
class SeenBatch:
    """A batch between its losses and the write into the banks.

    Attributes:
        index: Index of each training image, int64 ``(B,)``.
        embeddings: Features of the batch, without gradient.
        memos: Values that the method's ``loss`` passes to its ``update``.
    """

    index: Tensor
    embeddings: Embeddings
    memos: list[tuple[int, Any]]

    @classmethod
    def cat(cls, batches: Sequence[SeenBatch]) -> SeenBatch:
        """Join micro-batches; a single one is returned as it is."""
        if len(batches) == 1:
            return batches[0]
        return cls(
            torch.cat([batch.index for batch in batches]),
            Embeddings.cat([batch.embeddings for batch in batches]),
            [memo for batch in batches for memo in batch.memos],
        )


class EmbeddingNetwork(DescribedNetwork):
    """Backbone and head; in training also the method, and optionally an EMA teacher.

    Its state dict holds the method's banks and labels. The teacher, whose weights follow
    those in training, replaces backbone and head in evaluation mode, both for clustering
    and for the test.

    Args:
        backbone: Maps images to a feature map, tokens or vectors.
        heads: Maps a feature map to :class:`Embeddings`; has ``global_dim``, ``num_parts``
            and ``part_dim``.
        preprocessing: Size of the images, and mean and standard deviation of their
            channels.
        images_normalized: Whether the host's loader normalizes the images; otherwise the
            network does.
        ghost_batch_size: Images that batch normalization sees together; 0 for all.
        wave_block: WaveBlock behind stages of the backbone: ``"none"``, ``"plain"`` or
            ``"attentive"``; see :mod:`selcon_plugin.models.wave_block`.

    Attributes:
        method: Training method; None in a network that is only evaluated.
        teacher: EMA teacher, or None.
        global_distance_weight: Weight of the global feature in the test feature.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: nn.Module,
        preprocessing: Preprocessing,
        *,
        images_normalized: bool,
        ghost_batch_size: int = 0,
        wave_block: str = "none",
    ) -> None:
        super().__init__(preprocessing)
        self.images_normalized = images_normalized
        self.backbone = backbone
        self.heads: Any = heads
        if wave_block != "none":
            kind = cast(WaveBlockKind, wave_block)
            insert_wave_blocks(backbone, kind, input_size=preprocessing.size)
        if ghost_batch_size:
            for part in (self.backbone, self.heads):
                convert_ghost_batch_norm(part, ghost_batch_size)
        self.teacher: EMATeacher | None = None
        self.method: Method | None = None
        # The batch, or micro-batches, of the current step. This is the only queue between
        # losses(), which reads the banks, and update_banks(), which writes them.
        self._pending: list[SeenBatch] = []
        self._steps = StepCheck()
        # Path of each training image, to compare with those of a batch; None if unknown.
        self.training_paths: Sequence[str] | None = None

    def add_teacher(self, decay: float) -> None:
        """Add an EMA teacher that follows the weights from now on.

        Args:
            decay: Weight of the old value; 0 for no teacher.
        """
        if decay:
            self.teacher = EMATeacher(self._trained(), decay)

    def _trained(self) -> nn.ModuleDict:
        """Return backbone and head as one module, without registering them again."""
        return nn.ModuleDict({"backbone": self.backbone, "heads": self.heads})

    @property
    def device(self) -> torch.device:
        """Device of the network's buffers."""
        return self.pixel_mean.device

    def embed(self, images: Tensor, *, student: bool = False) -> Embeddings:
        """Compute the embeddings of images.

        Args:
            images: RGB images from the host's loader, shape ``(B, 3, h, w)``. They are not
                changed: FastReID's own models normalize in place, after which a flip test
                normalizes twice.
            student: Whether to use the weights in training even where the teacher would
                replace them.

        Returns:
            Global and part features of unit norm.

        Raises:
            TypeError: If the head does not return embeddings.
        """
        _, heads = self._parts(student)
        embeddings = self.apply_head(heads, self.feature_map(images, student=student))
        if not isinstance(embeddings, Embeddings):
            raise TypeError(
                "the head must return selcon_plugin.Embeddings, as GlobalPartEmbedding "
                "does, or in FastReID GlobalPartHead (MODEL.HEADS.NAME); "
                f"{type(self.heads).__name__} returned {type(embeddings).__name__}"
            )
        return embeddings

    def apply_head(self, head: nn.Module, feature_map: Tensor) -> Any:
        """Apply the head; a host may adapt what its own heads return.

        Args:
            head: The network's head, or its teacher's.
            feature_map: Shape ``(B, F, h, w)``.

        Returns:
            Embeddings; :meth:`embed` refuses anything else.
        """
        return head(feature_map)

    def feature_map(self, images: Tensor, *, student: bool = False) -> Tensor:
        """Compute the map of which the head computes the embeddings.

        Args:
            images: Images, as for :meth:`embed`.
            student: As for :meth:`embed`.

        Returns:
            The feature map, shape ``(B, F, h, w)``.
        """
        if images.device != self.device:  # tracing a copy would fix the device for good
            images = images.to(self.device)
        if not self.images_normalized:
            images = self._normalize(images)
        size = (images.shape[2], images.shape[3])
        backbone, _ = self._parts(student)
        feature_map: Tensor = backbone(images)
        if not isinstance(backbone, ModelBackbone):  # these already return a feature map
            feature_map = as_feature_map(feature_map, size)
        return feature_map

    def _parts(self, student: bool) -> tuple[nn.Module, nn.Module]:
        """Return backbone and head in use, which may be those of the teacher."""
        if self.teacher is None or self.training or student:
            return self.backbone, self.heads
        network = self.teacher.module
        assert isinstance(network, nn.ModuleDict)
        return network["backbone"], network["heads"]

    def _normalize(self, pixels: Tensor) -> Tensor:
        return (pixels - self.pixel_mean) / self.pixel_std

    def test_feature(self, embeddings: Embeddings) -> Tensor:
        """Join global and part features so that cosine ranks like the training distance.

        Args:
            embeddings: Embeddings of a batch.

        Returns:
            Unit vectors, shape ``(B, C + S*D)``.
        """
        return fused_feature(embeddings, global_distance_weight=self.global_distance_weight)

    def losses(self, images: Tensor, index: Tensor, camids: Tensor) -> dict[str, Tensor]:
        """Compute the method's losses of a batch, and keep its features for the banks.

        Args:
            images: Images, as for :meth:`embed`.
            index: Index of each training image, int64 ``(B,)``.
            camids: Camera of each image, int64 ``(B,)``, -1 where unknown.

        Returns:
            Scalar losses by name.
        """
        views = [self.embed(view) for view in self.views_of(images)]
        return self.method_losses(self.embed(images), index, camids, views)

    def method_losses(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor,
        views: Sequence[Embeddings] = (),
    ) -> dict[str, Tensor]:
        """Compute the losses from features, for a host that computes the features itself.

        Args:
            embeddings: Features of the batch, with gradient.
            index: Index of each training image, int64 ``(B,)``.
            camids: Camera of each image, int64 ``(B,)``, -1 where unknown.
            views: Features of each view that :meth:`views_of` returned.

        Returns:
            Scalar losses by name.

        Raises:
            RuntimeError: If this is not a step of a label-free training: the network has no
                method, its banks were not written after the step before, or the index is
                not that of a training image.
        """
        if self.method is None:
            raise RuntimeError(
                "this network was built without training images and has no method: train "
                "with the host's trainer (SelConTrainer, ImageSelConEngine), which adds it"
            )
        self._steps.check_batch(self, index, self._pending)
        index, camids = index.to(self.device), camids.to(self.device)
        losses = self.method.loss(embeddings, index, camids, *views)
        seen = SeenBatch(index, embeddings.detach(), self.method.take_memos())
        self._pending.append(seen)
        return losses

    def begin_step(self, num_batches: int = 1) -> None:
        """Open a training step; :meth:`update_banks` or :meth:`clear_pending` closes it.

        Args:
            num_batches: Number of batches, or micro-batches, of the step.

        Raises:
            RuntimeError: If the banks were not written after the step before.
        """  # noqa: DOC502  (raised by the functions called here)
        self._steps.open(num_batches, self._pending)

    def check_training(self) -> None:
        """Refuse a training that takes the features but never asks for the losses.

        A host's own engine would take them for the logits of identities.

        Raises:
            RuntimeError: If the weights have changed since the last such call, without a
                call of :meth:`method_losses`.
        """  # noqa: DOC502  (raised by the functions called here)
        if self.training and torch.is_grad_enabled():
            self._steps.check_features_only(self)

    def check_paths(self, index: Tensor, paths: Sequence[str]) -> None:
        """Refuse a batch whose labels are not the indices of its images.

        Args:
            index: Labels of the batch, ``(B,)``.
            paths: Path of each image.

        Raises:
            RuntimeError: If a label is not the index of the image at its path, or images
                share a label.
        """  # noqa: DOC502  (raised by the functions called here)
        check_paths(index, paths, self.training_paths)

    def views_of(self, images: Tensor) -> list[Tensor]:
        """Generate the additional views of a batch that the method requires.

        Args:
            images: Images, as for :meth:`embed`.

        Returns:
            Batches of the same shape; an empty list for most methods.
        """
        if self.method is None or type(self.method).make_views is Method.make_views:
            return []
        pixels = images.to(self.device)
        if not self.images_normalized:
            return list(self.method.make_views(pixels))
        pixels = pixels * self.pixel_std + self.pixel_mean
        return [self._normalize(view) for view in self.method.make_views(pixels)]

    def update_banks(self) -> None:
        """Write the features since the last call into the method's banks.

        Raises:
            RuntimeError: If there was no training step since the last call.
        """
        if not self._pending or self.method is None:
            raise RuntimeError("update_banks() must follow a training step")
        seen = self.pending_batch()
        self.clear_pending()
        self.method.return_memos(seen.memos)
        self.method.update(seen.index, seen.embeddings)

    def pending_batch(self) -> SeenBatch:
        """Return the batch since the last write of the banks, with micro-batches joined.

        The micro-batches are joined at the first call and stay joined.
        """
        self._pending = [SeenBatch.cat(self._pending)]
        return self._pending[0]

    def clear_pending(self) -> None:
        """Drop the batch since the last write of the banks, because its step is skipped."""
        self._pending = []
        self._steps.close()

    def update_teacher(self, *, restart: bool = False) -> None:
        """Update the teacher's weights by one step; do nothing without a teacher.

        Args:
            restart: Whether to copy the weights instead, as at the start of a run.
        """
        if self.teacher is None:
            return
        if restart:
            self.teacher.reset(self._trained())
        else:
            self.teacher.update(self._trained())
