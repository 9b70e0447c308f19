"""FastReID backbones from any timm or torchreid model.

In a config::

    MODEL:
      BACKBONE:
        NAME: build_timm_backbone
        TIMM_NAME: tf_efficientnet_lite0
        PRETRAIN: True
        PRETRAIN_PATH: "pypi:efficientnet_lite0"   # "": timm's own; or the path of a file

or::

    MODEL:
      BACKBONE:
        NAME: build_torchreid_backbone
        TORCHREID_NAME: osnet_ain_x1_0
        PRETRAIN: True
        PRETRAIN_PATH: ""   # torchreid's own download; or the path of a file

``FEAT_DIM`` can be omitted: ``SelCon`` infers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastreid.config import CfgNode
from fastreid.modeling.backbones import BACKBONE_REGISTRY

from selcon_plugin.fastreid_ext.host_values import input_size
from selcon_plugin.models.backbone import ModelBackbone
from selcon_plugin.models.timm import TimmBackbone, create_timm_backbone

__all__ = ["build_timm_backbone", "build_torchreid_backbone"]

_Backbone = TypeVar("_Backbone", bound=ModelBackbone)


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode) -> TimmBackbone:
    """Build the timm model that the config names, as a backbone.

    Reads ``TIMM_NAME``, ``PRETRAIN``, ``PRETRAIN_PATH`` and ``LAST_STRIDE`` under
    ``MODEL.BACKBONE``, ``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD`` and ``INPUT.SIZE_TRAIN``.
    The other keys of ``MODEL.BACKBONE`` (``DEPTH``, ``NORM``, ``WITH_IBN``, ...) describe
    FastReID's own networks and are not read. See ``create_timm_backbone``.

    Args:
        cfg: FastReID's config, after ``add_selcon_config``.

    Returns:
        A module from images ``(B, 3, H, W)``, normalized by FastReID, to a feature map
        ``(B, C, h, w)``, with attributes ``feature_dim`` and ``feature_stride``.

    Raises:
        ValueError: If ``TIMM_NAME`` is empty or unknown to timm, if the weights do not fit,
            or if the model does not run on images of ``INPUT.SIZE_TRAIN``. Other errors
            are those of ``create_timm_backbone``.
    """  # noqa: DOC502  (raised by the functions called here)
    return _build(cfg, "TIMM_NAME", "tf_efficientnet_lite0", create_timm_backbone)


@BACKBONE_REGISTRY.register()
def build_torchreid_backbone(cfg: CfgNode) -> ModelBackbone:
    """Build the torchreid model that the config names, as a backbone.

    Reads ``TORCHREID_NAME`` and otherwise the same keys as ``build_timm_backbone``. See
    ``selcon_plugin.models.torchreid.create_torchreid_backbone``.

    Args:
        cfg: FastReID's config, after ``add_selcon_config``.

    Returns:
        A module from images ``(B, 3, H, W)``, normalized by FastReID, to a feature map
        ``(B, C, h, w)``, with attributes ``feature_dim`` and ``feature_stride``.

    Raises:
        HostMissingError: If torchreid is not installed; the message names the command to
            install it.
        ValueError: If ``TORCHREID_NAME`` is empty or unknown to torchreid, if the weights
            do not fit, or if the model does not run on images of ``INPUT.SIZE_TRAIN``.
            Other errors are those of ``create_torchreid_backbone``.
    """  # noqa: DOC502  (raised by the functions called here)
    # Imported late, because FastReID does not require torchreid.
    from selcon_plugin.models.torchreid import create_torchreid_backbone

    return _build(cfg, "TORCHREID_NAME", "osnet_ain_x1_0", create_torchreid_backbone)


def _build(
    cfg: CfgNode, key: str, example: str, create: Callable[..., _Backbone]
) -> _Backbone:
    """Build the model that ``MODEL.BACKBONE.<key>`` names; errors name the config keys."""
    backbone = cfg.MODEL.BACKBONE
    name = backbone.get(key, "")
    if not name:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {backbone.NAME} needs MODEL.BACKBONE.{key}, which is "
            f"{name!r}: set it to a name, such as {example}"
        )
    try:
        return create(
            name,
            input_size=input_size(cfg),
            pretrained=backbone.PRETRAIN,
            weights=backbone.PRETRAIN_PATH,
            last_stride=backbone.LAST_STRIDE,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
    except (ValueError, FileNotFoundError) as error:
        keys = f"MODEL.BACKBONE.{key} {name!r}"
        if backbone.PRETRAIN:
            keys += f", MODEL.BACKBONE.PRETRAIN_PATH {backbone.PRETRAIN_PATH!r}"
        raise type(error)(f"{keys}: {error}") from error
