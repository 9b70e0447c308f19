"""Loading of trained FastReID networks, of the plugin's own and of supervised ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY
from torch import Tensor, nn

from selcon_plugin.fastreid_ext.meta_arch import SelCon
from selcon_plugin.fastreid_ext.supervised import CLASSIFIERS, to_own_head
from selcon_plugin.io.safe_loading import data_only
from selcon_plugin.models.inference import InferenceNetwork, load_all_tensors
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.pretrained import read_network_file
from selcon_plugin.models.state_keys import network_weights
from selcon_plugin.models.timm import timm_network


class HostNetwork(nn.Module):
    """Backbone and head of FastReID's own meta-architectures, without losses.

    Args:
        model: Model of FastReID with one backbone and one head.

    Raises:
        ValueError: If it has several heads.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not (hasattr(model, "backbone") and hasattr(model, "heads")):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE {type(model).__name__} has no single head, from "
                "which features can be taken: use FastReID's own tools"
            )
        self.backbone, self.heads = model.backbone, model.heads

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of images that are normalized.

        Args:
            images: Shape ``(B, 3, H, W)``.

        Returns:
            Features, shape ``(B, C)``.
        """
        features: Tensor = self.heads(self.backbone(images))
        return features


def load_network(
    cfg: CfgNode, weights: str | Path, device: torch.device
) -> InferenceNetwork:
    """Build the network of a config and load its weights.

    Args:
        cfg: Complete config, of this plugin or of a supervised training.
        weights: Checkpoint that was trained with it.
        device: Device to compute on.

    Returns:
        The network; for a run with a teacher, the teacher.

    Raises:
        ValueError: If a tensor of the network is missing in the file, or the config crops
            images at test time. ``FileNotFoundError`` if there is no file.
    """
    if len(cfg.INPUT.SIZE_TEST) == 1:
        raise ValueError(
            f"INPUT.SIZE_TEST {list(cfg.INPUT.SIZE_TEST)} keeps the shape of each image: "
            "set it to height and width, or use selcon extract with MODEL.WEIGHTS instead "
            "of --weights"
        )
    if cfg.INPUT.CROP.ENABLED:
        raise ValueError(
            "INPUT.CROP.ENABLED is True: to extract features of cropped images, use selcon "
            "extract with MODEL.WEIGHTS instead of --weights"
        )
    method, file = "", read_network_file(Path(weights).expanduser())
    if _is_plain_timm(cfg, file.state):
        return _timm_network(cfg, weights, device)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.PRETRAIN = False
    cfg.MODEL.DEVICE = "cpu"
    if "SELCON" in cfg.MODEL:
        cfg.MODEL.SELCON.EMA_DECAY = 0.0  # a teacher's weights replace the student's
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    ours = issubclass(architecture, SelCon)
    cfg.MODEL.HEADS.NUM_CLASSES = 0 if ours else 1
    with data_only():
        model = architecture(cfg)
    state = network_weights(file.state)
    if ours:
        model.images_normalized = True  # InferenceNetwork normalizes the images
        method = cfg.MODEL.SELCON.METHOD
        model.check_record(file.architecture, str(weights))
        state = to_own_head(state, model.heads)
    else:
        model = HostNetwork(model)
    load_all_tensors(model, state, source=str(weights), ignore_prefixes=CLASSIFIERS)
    preprocessing = Preprocessing(
        size=tuple(cfg.INPUT.SIZE_TEST),
        interpolation="bicubic",
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
    )
    return InferenceNetwork(model.to(device), preprocessing, method=method, host="fastreid")


def _is_plain_timm(cfg: CfgNode, state: Mapping[str, Tensor]) -> bool:
    """Return whether weights are those of the timm model without a head."""
    is_timm = cfg.MODEL.BACKBONE.NAME == "build_timm_backbone"
    return is_timm and not any(name.startswith("backbone.") for name in state)


def _timm_network(
    cfg: CfgNode, weights: str | Path, device: torch.device
) -> InferenceNetwork:
    """Build a timm model as torchreid's host does, so that either gives the same."""
    preprocessing = Preprocessing(
        size=tuple(cfg.INPUT.SIZE_TEST),
        interpolation="bilinear",
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
    )
    backbone = cfg.MODEL.BACKBONE
    network = timm_network(
        backbone.TIMM_NAME, preprocessing, str(weights), backbone.LAST_STRIDE
    )
    return InferenceNetwork(network.to(device), preprocessing, host="fastreid")
