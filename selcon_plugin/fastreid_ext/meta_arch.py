"""``SelCon``: FastReID meta-architecture with the plugin's head and method."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.modeling.backbones import build_backbone
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY
from torch import Tensor, nn

from selcon_plugin.engine.network import EmbeddingNetwork, usable_parts
from selcon_plugin.fastreid_ext.config import complete_config, selected_method_options
from selcon_plugin.fastreid_ext.host_heads import (
    build_head,
    head_embeddings,
    head_output,
    select_head,
)
from selcon_plugin.fastreid_ext.host_values import input_size
from selcon_plugin.io.responses import close_responses
from selcon_plugin.io.safe_loading import MIN_LOADED_RATIO, data_only, loading_noted
from selcon_plugin.methods import method_class
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.timm import TIMM_PREFIX

logger = logging.getLogger(__name__)

_OWN_BACKBONES = ("build_timm_backbone", "build_torchreid_backbone")


@META_ARCH_REGISTRY.register()
class SelCon(EmbeddingNetwork):
    """Meta-architecture that trains without identities.

    In training mode a batch's ``targets`` are the images' own indices, and the output is
    the method's losses. In evaluation mode the output is one unit vector per image, whose
    cosine ranks like the training distance.

    With ``MODEL.SELCON.EMA_DECAY`` a teacher, whose weights follow those in training,
    replaces the network in evaluation mode, both for clustering and for the test.

    The method's banks have one row per training image: ``MODEL.HEADS.NUM_CLASSES`` rows, a
    number that the trainer sets. With 0 there is no method; evaluation does not need one.
    """

    _returns_all = False

    def __init__(self, cfg: CfgNode) -> None:
        cfg = complete_config(cfg)
        cfg.defrost()
        node = cfg.MODEL.SELCON
        backbone = _build_backbone(cfg)
        size = input_size(cfg)
        select_head(cfg)
        channels, node.NUM_PARTS = usable_parts(
            backbone, size, node.METHOD, node.NUM_PARTS, cfg.MODEL.HEADS.EMBEDDING_DIM
        )
        if channels != cfg.MODEL.BACKBONE.FEAT_DIM:
            logger.info(
                "The backbone's feature map has %d channels; MODEL.BACKBONE.FEAT_DIM %d is "
                "not used",
                channels,
                cfg.MODEL.BACKBONE.FEAT_DIM,
            )
            cfg.MODEL.BACKBONE.FEAT_DIM = channels
        super().__init__(
            backbone,
            build_head(cfg, backbone, size),
            Preprocessing.in_training(size, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD),
            images_normalized=False,
            ghost_batch_size=node.GHOST_BATCH_SIZE,
            wave_block=node.WAVE_BLOCK,
        )
        self.add_teacher(node.EMA_DECAY)
        self.own_properties = {
            "host": "fastreid",
            "backbone": _backbone_label(cfg),
            "method": node.METHOD,
        }
        options = selected_method_options(cfg)
        self.global_distance_weight = options.get("global_distance_weight", 0.5)
        if cfg.MODEL.HEADS.NUM_CLASSES:
            self.method = method_class(node.METHOD)(
                cfg.MODEL.HEADS.NUM_CLASSES,
                self.heads.global_dim,
                self.heads.num_parts,
                self.heads.part_dim,
                **options,
            )

    def apply_head(self, head: nn.Module, feature_map: Tensor) -> Any:
        """Apply the head, which may be one of FastReID's kind."""
        return head_embeddings(head, feature_map)

    def forward(self, batched_inputs: dict[str, Any] | Tensor) -> Any:
        """Compute losses (training) or test features (evaluation).

        Args:
            batched_inputs: FastReID's batch: ``images``, RGB, 0..255, and in training
                ``targets`` (own indices) and ``camids``; or the images ``(B, 3, h, w)``
                themselves.

        Returns:
            Losses by name, or features of shape ``(B, C + S*D)``; inside
            :meth:`returning_all_outputs`, all outputs of a head that has several.
        """
        images: Tensor = (
            batched_inputs["images"] if isinstance(batched_inputs, dict) else batched_inputs
        )
        if not self.training:
            return self._evaluated(images)
        if not torch.is_grad_enabled():
            # FastReID's PreciseBN runs this pass to update the running statistics.
            self.embed(images)
            return {}
        assert isinstance(batched_inputs, dict), "training needs targets and camids"
        index = batched_inputs["targets"]
        self.check_paths(index, batched_inputs.get("img_paths", ()))
        return self.losses(images, index, batched_inputs["camids"])

    @contextlib.contextmanager
    def returning_all_outputs(self) -> Iterator[None]:
        """Let evaluation return all that a head returns, for an evaluator of a project."""
        self._returns_all = True
        try:
            yield
        finally:
            self._returns_all = False

    def _evaluated(self, images: Tensor) -> Any:
        if self._returns_all:
            _, head = self._parts(student=False)
            outputs = head_output(head, self.feature_map(images))
            if outputs is not None:
                return outputs
        return self.test_feature(self.embed(images))


def _backbone_label(cfg: CfgNode) -> str:
    """Name a backbone by what determines it, as the other host names the same model."""
    node = cfg.MODEL.BACKBONE
    if node.NAME == "build_torchreid_backbone":
        return str(node.TORCHREID_NAME)
    if node.NAME == "build_timm_backbone":
        return TIMM_PREFIX + str(node.TIMM_NAME)
    return f"{node.NAME} {node.DEPTH}"


def _build_backbone(cfg: CfgNode) -> nn.Module:
    """Build the backbone; errors name the config keys where FastReID's do not."""
    node = cfg.MODEL.BACKBONE
    try:
        with data_only(), loading_noted() as ratios:
            backbone: nn.Module = build_backbone(cfg)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        if node.NAME in _OWN_BACKBONES:
            raise  # the error names the keys already
        close_responses(error)  # FastReID downloads some weights
        raise ValueError(
            f"MODEL.BACKBONE.NAME {node.NAME} with DEPTH {node.DEPTH!r}, PRETRAIN "
            f"{node.PRETRAIN} and PRETRAIN_PATH {node.PRETRAIN_PATH!r} cannot be built: "
            f"{type(error).__name__}: {error}"
        ) from error
    if (
        node.NAME not in _OWN_BACKBONES
        and node.PRETRAIN_PATH
        and max(ratios, default=1) < MIN_LOADED_RATIO
    ):
        raise ValueError(
            f"MODEL.BACKBONE.PRETRAIN_PATH {node.PRETRAIN_PATH!r}: the weights do not fit "
            f"{node.NAME}: they contain {max(ratios):.0%} of its tensors by name"
        )
    return backbone
