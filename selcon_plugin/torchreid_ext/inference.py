"""Loading of trained torchreid networks: the plugin's own, and plain or timm models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from selcon_plugin.config.checks import check_name
from selcon_plugin.models.inference import InferenceNetwork, load_all_tensors
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.pretrained import read_state_dict
from selcon_plugin.models.timm import TIMM_PREFIX, timm_network
from selcon_plugin.models.torchreid import (
    CLASSIFIER,
    build_plain_model,
    torchreid_model_names,
)
from selcon_plugin.torchreid_ext.train import build_model


def load_network(
    cfg: CfgNode, weights: str | Path, device: torch.device
) -> InferenceNetwork:
    """Build the network of a config and load its weights.

    Args:
        cfg: Complete config.
        weights: Checkpoint of ``ImageSelConEngine``, or weights of the plain model that
            ``model.name`` names.
        device: Device to compute on.

    Returns:
        The network; for a run with a teacher, the teacher.

    Raises:
        ValueError: If the file belongs to another network. ``FileNotFoundError`` if it
            does not exist.
    """  # noqa: DOC502  (raised by the functions called here)
    preprocessing = Preprocessing(
        size=(cfg.data.height, cfg.data.width),
        interpolation="bilinear",
        pixel_mean=_pixels(cfg.data.norm_mean),
        pixel_std=_pixels(cfg.data.norm_std),
    )
    file = Path(weights).expanduser()
    state = read_state_dict(file)
    method = ""
    model: nn.Module
    if any(key.startswith("backbone.") for key in state):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.model.load_weights, cfg.model.pretrained, cfg.use_gpu = str(file), False, False
        cfg.test.evaluate = True
        model, method = build_model(cfg), cfg.selcon.method
    else:
        model = _plain_model(cfg, preprocessing, state, file)
    return InferenceNetwork(
        model.to(device), preprocessing, method=method, host="torchreid"
    )


def _pixels(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(255.0 * value for value in values)


def _plain_model(
    cfg: CfgNode, preprocessing: Preprocessing, state: dict[str, Tensor], file: Path
) -> nn.Module:
    name = cfg.model.name
    if name.startswith(TIMM_PREFIX):
        return timm_network(name, preprocessing, str(file), cfg.selcon.last_stride)
    check_name("the backbone", name, torchreid_model_names())
    model = build_plain_model(name)
    load_all_tensors(model, state, source=str(file), ignore_prefixes=CLASSIFIER)
    return model
