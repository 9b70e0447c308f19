"""FastReID networks that weights without a config belong to, by the names of the tensors.

A stride, a fixed pooling and the normalization of the images leave no trace in the tensors.
They are assumed to be those of FastReID's published ResNets, which the caller must tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selcon_plugin.config.host_data import RecognizedNetwork
from selcon_plugin.models.state_keys import network_weights

__all__ = ["recognize", "timm_settings"]

# Blocks of the four stages, and whether they are bottlenecks: FastReID's names of depths.
_DEPTHS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "18x",
    ((3, 4, 6, 3), False): "34x",
    ((3, 4, 6, 3), True): "50x",
    ((3, 4, 23, 3), True): "101x",
}
_POOL = "heads.pool_layer.p"
_NECK = "heads.bottleneck."


def recognize(state: Mapping[str, Tensor]) -> list[RecognizedNetwork]:
    """Find the ResNet of FastReID with ``EmbeddingHead`` that weights belong to.

    Args:
        state: Tensors by name.

    Returns:
        The network, or nothing.
    """
    weights = network_weights(state)
    depth = _depth(weights)
    ours = any(name.startswith("heads.global_") for name in weights)
    if not depth or ours or not any(name.startswith("heads.") for name in weights):
        return []
    backbone = _backbone(weights, depth)
    head = _head(weights)
    variants = [name for name in ("IBN", "SE", "NL") if backbone[f"WITH_{name}"]]
    title = " ".join(["FastReID's ResNet", depth.removesuffix("x"), *variants])
    pooling = "" if _POOL in weights else "average pooling, "
    pixels = {
        f"MODEL.{name.upper()}": weights[name].flatten().tolist()
        for name in ("pixel_mean", "pixel_std")  # in checkpoints of early versions
        if name in weights
    }
    return [
        RecognizedNetwork(
            title,
            settings={
                **_plain_settings(),
                **{f"MODEL.BACKBONE.{key}": value for key, value in backbone.items()},
                **{f"MODEL.HEADS.{key}": value for key, value in head.items()},
                **pixels,
            },
            assumed=f"{pooling}last stride 1 and images of 256 x 128",
        )
    ]


def timm_settings(name: str) -> dict[str, Any]:
    """Return the settings of a timm model whose feature is the average of its map.

    Args:
        name: Name of the model in timm.
    """
    return {
        **_plain_settings(),
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.BACKBONE.TIMM_NAME": name,
    }


def _plain_settings() -> dict[str, Any]:
    settings: dict[str, Any] = {
        "MODEL.META_ARCHITECTURE": "Baseline",
        "MODEL.BACKBONE.PRETRAIN": False,
    }
    return settings | ({} if torch.cuda.is_available() else {"MODEL.DEVICE": "cpu"})


def _depth(weights: Mapping[str, Tensor]) -> str:
    """Return FastReID's name of a depth; ``""`` if it is no such ResNet."""
    blocks = []
    for stage in range(1, 5):
        prefix = f"backbone.layer{stage}."
        names = (name for name in weights if name.startswith(prefix))
        blocks.append(len({name.removeprefix(prefix).partition(".")[0] for name in names}))
    bottleneck = "backbone.layer1.0.conv3.weight" in weights
    return _DEPTHS.get((tuple(blocks), bottleneck), "")


def _backbone(weights: Mapping[str, Tensor], depth: str) -> dict[str, Any]:
    return {
        "NAME": "build_resnet_backbone",
        "DEPTH": depth,
        "LAST_STRIDE": 1,
        "FEAT_DIM": 512 if depth in ("18x", "34x") else 2048,
        "WITH_IBN": any(".bn1.IN." in name for name in weights),
        "WITH_SE": any(".se." in name for name in weights),
        "WITH_NL": any(name.startswith("backbone.NL_") for name in weights),
    }


def _head(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    projection = weights.get(f"{_NECK}0.weight")
    projects = projection is not None and projection.dim() == 4
    norm = f"{_NECK}{int(projects)}.running_mean"
    return {
        "NAME": "EmbeddingHead",
        "EMBEDDING_DIM": len(projection) if projects and projection is not None else 0,
        "WITH_BNNECK": norm in weights,
        "POOL_LAYER": "GeneralizedMeanPoolingP" if _POOL in weights else "GlobalAvgPool",
    }
