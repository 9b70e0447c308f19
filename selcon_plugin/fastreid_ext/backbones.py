"""Any timm model as a FastReID backbone.

In a config::

    MODEL:
      BACKBONE:
        NAME: build_timm_backbone
        TIMM_NAME: tf_efficientnet_lite0
        PRETRAIN: True
        PRETRAIN_PATH: "pypi:efficientnet_lite0"   # "": timm's own; or the path of a file

``FEAT_DIM`` need not be set: ``SelCon`` finds it.
"""

from __future__ import annotations

from fastreid.config import CfgNode
from fastreid.modeling.backbones import BACKBONE_REGISTRY

from selcon_plugin.backbones import TimmBackbone, create_timm_backbone

__all__ = ["build_timm_backbone"]


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
        A module from images ``(B, 3, H, W)``, normalised by FastReID, to a feature map
        ``(B, C, h, w)``, with attributes ``feature_dim`` and ``feature_stride``.

    Raises:
        ValueError: If ``TIMM_NAME`` is empty or unknown to timm, if the weights do not fit,
            or if the model does not run on images of ``INPUT.SIZE_TRAIN``. Other errors
            are those of ``create_timm_backbone``.
    """
    backbone = cfg.MODEL.BACKBONE
    name = backbone.get("TIMM_NAME", "")
    if not name:
        raise ValueError(
            "MODEL.BACKBONE.NAME build_timm_backbone needs MODEL.BACKBONE.TIMM_NAME, which "
            f"is {name!r}: set it to a name in timm, such as tf_efficientnet_lite0"
        )
    try:
        return create_timm_backbone(
            name,
            input_size=tuple(cfg.INPUT.SIZE_TRAIN),
            pretrained=backbone.PRETRAIN,
            weights=backbone.PRETRAIN_PATH,
            last_stride=backbone.LAST_STRIDE,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
    except (ValueError, FileNotFoundError) as error:
        keys = f"MODEL.BACKBONE.TIMM_NAME {name!r}"
        if backbone.PRETRAIN:
            keys += f", MODEL.BACKBONE.PRETRAIN_PATH {backbone.PRETRAIN_PATH!r}"
        raise type(error)(f"{keys}: {error}") from error
