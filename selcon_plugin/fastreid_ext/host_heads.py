"""Heads of FastReID's kind, such as those of its projects: one feature of an image.

Such a head returns logits of identities in training mode, and the feature that FastReID
compares in evaluation mode. Here it returns that feature in both modes, with the gradient,
and trains without parts. Its weights keep their names, so that checkpoints fit.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.modeling.heads import REID_HEADS_REGISTRY, EmbeddingHead, build_heads
from torch import Tensor, nn
from torch.nn import functional as F

from selcon_plugin.features import Embeddings, GlobalPartEmbedding
from selcon_plugin.models.feature_map import infer_feature_shape

logger = logging.getLogger(__name__)

# FastReID's default head classifies identities; ours replaces it.
_HOST_DEFAULT_HEAD = "EmbeddingHead"
_OWN_HEAD = "GlobalPartHead"
_TRIED_CLASSES = (3, 5)  # any two numbers, to see whether the output follows them
_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError, KeyError),
    *(RuntimeError, TypeError, ValueError),
)


def select_head(cfg: CfgNode) -> None:
    """Replace FastReID's default head, and turn parts off for a head that has none.

    Args:
        cfg: Complete config, which is changed in place.
    """
    if cfg.MODEL.HEADS.NAME == _HOST_DEFAULT_HEAD:
        cfg.MODEL.HEADS.NAME = _OWN_HEAD
    head = REID_HEADS_REGISTRY.get(cfg.MODEL.HEADS.NAME)
    if isinstance(head, type) and issubclass(head, EmbeddingHead):
        cfg.MODEL.SELCON.NUM_PARTS = 0


def build_head(cfg: CfgNode, backbone: nn.Module, input_size: tuple[int, int]) -> nn.Module:
    """Build the head that ``MODEL.HEADS.NAME`` selects.

    Weights that do not change the feature, such as those of a classifier, are frozen. A
    head of FastReID's kind gets the attributes of ``GlobalPartEmbedding`` that a method is
    built from.

    Args:
        cfg: Complete config, with the channels of the feature map.
        backbone: Backbone, whose feature map the head gets.
        input_size: Height and width of the images.

    Returns:
        The head.

    Raises:
        ValueError: If it cannot be built, fails on the feature map, or returns no feature.
    """
    head = REID_HEADS_REGISTRY.get(cfg.MODEL.HEADS.NAME)
    if isinstance(head, type) and issubclass(head, GlobalPartEmbedding):
        built: nn.Module = build_heads(cfg)
        return built
    label = f"MODEL.HEADS.NAME {cfg.MODEL.HEADS.NAME}"
    cfg = cfg.clone()
    cfg.defrost()
    feature_shape = infer_feature_shape(backbone, input_size)
    if cfg.MODEL.HEADS.POOL_LAYER == "Flatten":  # which keeps each value of the map
        cfg.MODEL.BACKBONE.FEAT_DIM = math.prod(feature_shape)
    try:
        # There are no identities to classify.
        built, embeddings, unused, others = _build_with_classes(cfg, 0, feature_shape)
    except _FAULTS as error:
        widths = _widths(cfg, feature_shape)
        if widths == _TRIED_CLASSES:
            raise ValueError(
                f"{label} returns a score of each class (MODEL.HEADS.NUM_CLASSES), such as "
                "an identity or an attribute, and no feature of the image, which a "
                "training without labels needs: use a head that returns its feature in "
                f"evaluation mode, or set it to {_OWN_HEAD}"
            ) from error
        if len(set(widths)) != 1:
            size = "x".join(map(str, feature_shape))
            raise ValueError(
                f"{label} does not return features of a {size} feature map: "
                f"{type(error).__name__}: {' '.join(str(error).split())}. Check its keys, "
                f"MODEL.HEADS and INPUT.SIZE_TRAIN, or set it to {_OWN_HEAD}"
            ) from error
        # It returns a feature, but some layer of its classifier needs a class.
        built, embeddings, unused, others = _build_with_classes(cfg, 1, feature_shape)
    _describe(built, embeddings)
    for name, weight in built.named_parameters():
        if name in unused:
            weight.requires_grad = False
    if embeddings.part_features is None:
        more = f", the first of the {others + 1} tensors that it returns" * bool(others)
        logger.info(
            "%s has no parts (NUM_PARTS 0): training on its global feature of %d values%s",
            label,
            embeddings.global_features.shape[1],
            more,
        )
    return built


def _build_with_classes(
    cfg: CfgNode, num_classes: int, feature_shape: tuple[int, int, int]
) -> tuple[nn.Module, Embeddings, set[str], int]:
    """Build a head with a number of classes; return it, and what :func:`_probe` does."""
    cfg.MODEL.HEADS.NUM_CLASSES = num_classes
    built: nn.Module = build_heads(cfg)
    return built, *_probe(built, feature_shape)


def _widths(cfg: CfgNode, feature_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the size of a head's output by its number of classes; empty if it fails."""
    try:
        return tuple(
            _build_with_classes(cfg, number, feature_shape)[1].global_features.shape[1]
            for number in _TRIED_CLASSES
        )
    except _FAULTS:
        return ()


def head_output(head: nn.Module, feature_map: Tensor) -> Any:
    """Return what a head of FastReID's kind returns in evaluation mode, as it is.

    Args:
        head: Result of :func:`build_head`, or a copy, in evaluation mode.
        feature_map: Shape ``(B, F, h, w)``.

    Returns:
        Its outputs if it has several; None for one vector of each image, as of the heads of
        this plugin.
    """
    if isinstance(head, GlobalPartEmbedding):
        return None
    output = head(feature_map.contiguous())
    return None if isinstance(output, Tensor | Embeddings) else output


def head_embeddings(head: nn.Module, feature_map: Tensor) -> Any:
    """Apply a head.

    Args:
        head: Result of :func:`build_head`, or a copy.
        feature_map: Shape ``(B, F, h, w)``.

    Returns:
        Embeddings; for a head of this plugin, what it returns.
    """
    if isinstance(head, GlobalPartEmbedding):
        return head(feature_map)
    # FastReID's pooling layers change the shape of a map only if it is contiguous.
    feature_map = feature_map.contiguous()
    if not head.training:
        return _as_embeddings(head(feature_map))
    # Only the head itself changes its mode: its layers, such as batch normalization, keep
    # theirs.
    head.training = False
    try:
        output = head(feature_map)
    finally:
        head.training = True
    return _as_embeddings(output)


def _as_embeddings(output: Any) -> Embeddings:
    if isinstance(output, Embeddings):
        return output
    if isinstance(output, dict):
        if "features" not in output:
            raise ValueError(f"it returns {', '.join(map(str, output))}, but no 'features'")
        output = output["features"]
    feature = output[0] if isinstance(output, list | tuple) and output else output
    if not isinstance(feature, Tensor):
        raise TypeError(f"it returns {type(feature).__name__}, not a tensor")
    vectors = feature.flatten(1)
    if vectors.shape[1] == 0 or vectors.shape[1] != feature.shape[1]:
        raise ValueError(
            f"it returns shape {tuple(feature.shape)}, not one vector (B, C) of an image"
            + " (it has no identities to score)" * (vectors.shape[1] == 0)
        )
    return Embeddings(F.normalize(vectors))


def _probe(
    head: nn.Module, feature_shape: tuple[int, int, int]
) -> tuple[Embeddings, set[str], int]:
    """Apply a copy of a head to two feature maps.

    Returns:
        Its output, the names of the weights that it does not depend on, and the number of
        tensors that are not used.

    Raises:
        ValueError: If the output does not depend on the feature map.
    """
    copied, outputs = copy.deepcopy(head).eval(), []
    copied.register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        feature_map = torch.rand(2, *feature_shape, requires_grad=True)
        found = head_embeddings(copied, feature_map)
    if not found.global_features.requires_grad:
        raise ValueError("its features do not depend on the feature map by a gradient")
    total = sum(part.sum() for part in found if part is not None)
    weights = {n: w for n, w in copied.named_parameters() if w.requires_grad}
    gradients = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
    unused = {
        name for name, gradient in zip(weights, gradients, strict=True) if gradient is None
    }
    (output,) = outputs
    several = isinstance(output, list | tuple) and not isinstance(output, Embeddings)
    return found, unused, len(output) - 1 if several else 0


def _describe(head: Any, embeddings: Embeddings) -> None:
    """Set the attributes of ``GlobalPartEmbedding`` that a head lacks."""
    parts = embeddings.part_features
    for name, value in {
        "global_dim": embeddings.global_features.shape[1],
        "num_parts": 0 if parts is None else parts.shape[1],
        "part_dim": 0 if parts is None else parts.shape[2],
    }.items():
        if not hasattr(head, name):
            setattr(head, name, value)
