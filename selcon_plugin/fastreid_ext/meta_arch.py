"""``SelCon``: FastReID's backbone, our head, our method."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.modeling.backbones import build_backbone
from fastreid.modeling.heads import build_heads
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY
from torch import Tensor, nn

from selcon_plugin.backbones import as_feature_map, infer_feature_shape
from selcon_plugin.ema import EMATeacher
from selcon_plugin.fastreid_ext.config import complete_config, selected_method_options
from selcon_plugin.features import Embeddings, check_parts_fit, fused_feature
from selcon_plugin.methods import Method, build_method, method_class
from selcon_plugin.normalization import convert_ghost_batch_norm

logger = logging.getLogger(__name__)

# FastReID's default head classifies identities; it gives way to ours.
_HOST_DEFAULT_HEAD = "EmbeddingHead"


@META_ARCH_REGISTRY.register()
class SelCon(nn.Module):
    """Meta-architecture that trains without identities.

    In training mode a batch's ``targets`` are the images' own indices, and the result is
    the method's losses. In evaluation mode the result is one unit vector per image whose
    cosine ranks like the training distance.

    With ``MODEL.SELCON.EMA_DECAY`` a teacher, whose weights follow those in training, takes
    the network's place in evaluation mode: for clustering and for the test.

    The method's banks have one row per training image: ``MODEL.HEADS.NUM_CLASSES`` rows, a
    number the trainer sets. With 0 there is no method, which is all that evaluation needs.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        cfg = complete_config(cfg)
        cfg.defrost()
        self.input_size: tuple[int, int] = tuple(cfg.INPUT.SIZE_TRAIN)
        self.backbone = build_backbone(cfg)
        self._fit_head_to_backbone(cfg)
        if cfg.MODEL.HEADS.NAME == _HOST_DEFAULT_HEAD:
            cfg.MODEL.HEADS.NAME = "GlobalPartHead"
        self.heads = build_heads(cfg)
        if cfg.MODEL.SELCON.GHOST_BATCH_SIZE:
            for part in (self.backbone, self.heads):
                convert_ghost_batch_norm(part, cfg.MODEL.SELCON.GHOST_BATCH_SIZE)
        self.teacher: EMATeacher | None = None
        if cfg.MODEL.SELCON.EMA_DECAY:
            self.teacher = EMATeacher(self._network(), cfg.MODEL.SELCON.EMA_DECAY)
        mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN), torch.tensor(cfg.MODEL.PIXEL_STD)
        self.register_buffer("pixel_mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(1, -1, 1, 1), persistent=False)
        options = selected_method_options(cfg)
        self.global_distance_weight: float = options.get("global_distance_weight", 0.5)
        self.method: Method | None = None
        if cfg.MODEL.HEADS.NUM_CLASSES:
            self.method = build_method(
                cfg.MODEL.SELCON.METHOD,
                cfg.MODEL.HEADS.NUM_CLASSES,
                self.heads.global_dim,
                self.heads.num_parts,
                self.heads.part_dim,
                **options,
            )
        # The batch, or micro-batches, whose step is under way: read by loss(), to be
        # written by update_banks().
        self._pending: list[tuple[Tensor, Embeddings]] = []

    def _network(self) -> nn.ModuleDict:
        """Return backbone and head as one module; not registered a second time."""
        return nn.ModuleDict({"backbone": self.backbone, "heads": self.heads})

    def _fit_head_to_backbone(self, cfg: CfgNode) -> None:
        """Set the head's sizes to what the backbone really returns."""
        channels, rows, _ = infer_feature_shape(self.backbone, self.input_size)
        if channels != cfg.MODEL.BACKBONE.FEAT_DIM:
            logger.info(
                "The backbone's feature map has %d channels; MODEL.BACKBONE.FEAT_DIM %d is "
                "not used",
                channels,
                cfg.MODEL.BACKBONE.FEAT_DIM,
            )
            cfg.MODEL.BACKBONE.FEAT_DIM = channels
        method = cfg.MODEL.SELCON.METHOD
        if not method_class(method).uses_parts and cfg.MODEL.SELCON.NUM_PARTS:
            logger.info("%s has no use for parts: the head has none", method)
            cfg.MODEL.SELCON.NUM_PARTS = 0
        if rows == 1 and cfg.MODEL.SELCON.NUM_PARTS:
            logger.warning(
                "%s returns one vector and no feature map: training without parts",
                cfg.MODEL.BACKBONE.NAME,
            )
            cfg.MODEL.SELCON.NUM_PARTS = 0
        check_parts_fit(rows, cfg.MODEL.SELCON.NUM_PARTS)

    @property
    def device(self) -> torch.device:
        """Device of the model's buffers."""
        return self.pixel_mean.device

    def embed(
        self, batched_inputs: dict[str, Any] | Tensor, *, student: bool = False
    ) -> Embeddings:
        """Images to embeddings: normalise, backbone, head.

        Args:
            batched_inputs: A batch with ``images``, or the images ``(B, 3, h, w)``
                themselves, RGB, 0..255. Left unchanged: FastReID's own models normalise in
                place, after which a flip test normalises twice.
            student: Whether to use the weights in training even where a teacher would
                take their place.

        Returns:
            Unit global and part features.

        Raises:
            TypeError: If the head named in the config does not return embeddings.
        """
        images: Tensor = (
            batched_inputs["images"] if isinstance(batched_inputs, dict) else batched_inputs
        )
        images = (images.to(self.device) - self.pixel_mean) / self.pixel_std
        size = (images.shape[2], images.shape[3])
        backbone, heads = self.backbone, self.heads
        if self.teacher is not None and not self.training and not student:
            network = self.teacher.module
            assert isinstance(network, nn.ModuleDict)
            backbone, heads = network["backbone"], network["heads"]
        embeddings = heads(as_feature_map(backbone(images), size))
        if not isinstance(embeddings, Embeddings):
            raise TypeError(
                "MODEL.HEADS.NAME must name a head that returns selcon_plugin.Embeddings, "
                f"such as GlobalPartHead; {type(self.heads).__name__} returned "
                f"{type(embeddings).__name__}"
            )
        return embeddings

    def forward(
        self, batched_inputs: dict[str, Any] | Tensor
    ) -> dict[str, Tensor] | Tensor:
        """Compute losses (training) or test features (evaluation).

        Args:
            batched_inputs: FastReID's batch: ``images``, and in training ``targets`` (own
                indices) and ``camids``.

        Returns:
            Losses by name, or features of shape ``(B, C + S*D)``.

        Raises:
            RuntimeError: If the model was built without the number of training images.
        """
        embeddings = self.embed(batched_inputs)
        if not self.training:
            return fused_feature(
                embeddings, global_distance_weight=self.global_distance_weight
            )
        if not torch.is_grad_enabled():
            return {}  # FastReID's PreciseBN: a pass for its side effect on the statistics
        if self.method is None:
            raise RuntimeError(
                "SelCon was built without training images (MODEL.HEADS.NUM_CLASSES is 0); "
                "train it with SelConTrainer, which sets their number"
            )
        assert isinstance(batched_inputs, dict)
        index = batched_inputs["targets"].to(self.device)
        camids = batched_inputs["camids"].to(self.device)
        losses = self.method.loss(embeddings, index, camids)
        self._pending.append((index, embeddings.detach()))
        return losses

    def update_banks(self) -> None:
        """Write what was seen since the last call into the method's banks.

        Raises:
            RuntimeError: If there was no training step since the last call.
        """
        if not self._pending or self.method is None:
            raise RuntimeError("update_banks() must follow a training step")
        index, embeddings = zip(*self._pending, strict=True)
        self._pending = []
        self.method.update(torch.cat(index), Embeddings.cat(embeddings))

    def update_teacher(self, *, restart: bool = False) -> None:
        """Let the teacher follow the weights by one step; nothing without a teacher.

        Args:
            restart: Whether to take the weights over as they are, to begin a run.
        """
        if self.teacher is None:
            return
        if restart:
            self.teacher.reset(self._network())
        else:
            self.teacher.update(self._network())
