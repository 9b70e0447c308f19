"""Weights of FastReID's own heads as weights of the plugin's head.

Both heads pool, project and normalize. In ``EmbeddingHead`` the projection is a convolution
without bias, and either layer may be absent; in ``GlobalPartHead`` it is linear, and there
is always a normalization.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selcon_plugin.features import GlobalPartEmbedding

__all__ = ["CLASSIFIERS", "projection_width", "to_own_head"]

# Prefixes of what only a training on identities needs.
CLASSIFIERS = ("heads.weight", "heads.classifier.", "heads.cls_layer.")
_NECK = "heads.bottleneck."
# In checkpoints of early versions; the config has them.
_NORMALIZATION = ("pixel_mean", "pixel_std")


def to_own_head(state: Mapping[str, Tensor], head: nn.Module) -> dict[str, Tensor]:
    """Rename the weights of FastReID's ``EmbeddingHead`` to those of the plugin's head.

    The features of the global branch are then those of FastReID, of unit length: a layer
    that FastReID's head does not have becomes the identity.

    Args:
        state: Weights of a FastReID network, or of this plugin, which are not changed.
        head: Head of the network that gets them; another one than the plugin's keeps the
            names.

    Returns:
        Weights by the names of the plugin.
    """
    heads = [name for name in state if name.startswith("heads.")]
    is_own = any(name.startswith("heads.global_") for name in heads)
    if is_own or not heads or not isinstance(head, GlobalPartEmbedding):
        return dict(state)
    neck = {k.removeprefix(_NECK): v for k, v in state.items() if k.startswith(_NECK)}
    own = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith((_NECK, *CLASSIFIERS, *_NORMALIZATION))
    }
    exponent = own.pop("heads.pool_layer.p", None)
    if exponent is not None:
        own["heads.pool.p"] = exponent
    projection, place = neck.get("0.weight"), "0."
    if projection is not None and projection.dim() == 4:
        place = "1."
        own |= _projection(projection[:, :, 0, 0])
    elif isinstance(getattr(head, "global_projection", None), nn.Linear):
        linear = head.global_projection
        assert isinstance(linear, nn.Linear)
        if linear.in_features == linear.out_features:
            own |= _projection(torch.eye(linear.in_features))
    norm = {k.removeprefix(place): v for k, v in neck.items() if k.startswith(place)}
    norm = norm or _identity_norm(head)
    return own | {f"heads.global_norm.{name}": tensor for name, tensor in norm.items()}


def projection_width(state: Mapping[str, Tensor]) -> int:
    """Return the width of the projection in FastReID's ``EmbeddingHead``; 0 for none.

    Args:
        state: Weights of a FastReID network.
    """
    weight = state.get(f"{_NECK}0.weight")
    return len(weight) if weight is not None and weight.dim() == 4 else 0


def _projection(weight: Tensor) -> dict[str, Tensor]:
    return {
        "heads.global_projection.weight": weight,
        "heads.global_projection.bias": torch.zeros(len(weight)),
    }


def _identity_norm(head: nn.Module) -> dict[str, Tensor]:
    """Return the weights with which the normalization changes only the scale."""
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    values["num_batches_tracked"] = 1  # or its statistics would be measured
    norm = head.global_norm
    assert isinstance(norm, nn.Module)
    return {
        name: torch.full_like(tensor, values[name])
        for name, tensor in norm.state_dict().items()
        if name in values
    }
