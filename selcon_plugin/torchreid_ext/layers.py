"""Layers that a script names to torchreid: ``open_layers`` and ``new_layers``.

torchreid's scripts name layers of its own models, nearly always ``classifier``. Here the
head replaces the classifier and every other layer behind the feature map, so that such a
name means the head. Other layers of the model are inside the backbone.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from selcon_plugin.torchreid_ext.models import SelConModel

logger = logging.getLogger(__name__)

_CLASSIFIER = "classifier"


def find_layers(
    network: SelConModel, names: str | Sequence[str], *, key: str = "open_layers"
) -> list[nn.Module]:
    """Find the layers of a network that torchreid's names mean.

    Args:
        network: Network with our head.
        names: ``"heads"``, ``"backbone"``, or names of layers of torchreid's model; those
            behind the feature map, such as ``"classifier"``, mean the head.
        key: Name of the argument, for the error message.

    Returns:
        The layers, each one once.

    Raises:
        ValueError: If a name is no layer, or none of the layers has weights.
    """
    names = [names] if isinstance(names, str) else list(names)
    layers = {id(layer): layer for layer in (_find(network, n, key) for n in names)}
    if not any(True for layer in layers.values() for _ in layer.parameters()):
        raise ValueError(
            f"{key} {names} has no layer with weights: nothing would be trained. Name at "
            "least one, such as 'classifier', which means the head"
        )
    return list(layers.values())


def _find(network: SelConModel, name: str, key: str) -> nn.Module:
    own: dict[str, nn.Module] = {"heads": network.heads, "backbone": network.backbone}
    model = getattr(network.backbone, "model", network.backbone)
    layers: dict[str, nn.Module] = dict(model.named_children())
    if name in own:
        return own[name]
    if name == _CLASSIFIER or isinstance(layers.get(name), nn.Identity):
        return own["heads"]
    if name in layers:
        return layers[name]
    known = [*own, *dict.fromkeys([_CLASSIFIER, *layers])]
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"{key} {name!r} is no layer of the model: {hint}It has {', '.join(known)}"
    )


def open_only(network: SelConModel, layers: Iterable[nn.Module]) -> None:
    """Train some layers of a network and freeze the others, as torchreid does.

    Args:
        network: Network, whose weights and normalization layers are frozen or not.
        layers: Layers to train.
    """
    for _, part in network.named_children():
        part.eval()
        for parameter in part.parameters():
            parameter.requires_grad_(False)
    for layer in layers:
        layer.train()
        for parameter in layer.parameters():
            parameter.requires_grad_(True)


def stage_rates(
    optimizer: torch.optim.Optimizer,
    network: SelConModel,
    new_layers: str | Sequence[str] = _CLASSIFIER,
) -> None:
    """Put new layers into the last group of an optimizer with staged learning rates.

    torchreid's ``build_optimizer(staged_lr=True)`` knows only the direct parts of a model,
    so that for a network with our head the group of the new layers may be empty, and the
    head would be trained with the reduced rate of the pretrained layers. An optimizer
    without such a group is not changed.

    Args:
        optimizer: Optimizer of the network's weights.
        network: Network with our head.
        new_layers: Names of the new layers, as for :func:`find_layers`.

    Raises:
        ValueError: If a name is no layer.
    """  # noqa: DOC502  (raised by the functions called here)
    groups = optimizer.param_groups
    if len(groups) != 2 or groups[1]["params"]:
        return
    layers = find_layers(network, new_layers, key="new_layers")
    new = {id(p) for layer in layers for p in layer.parameters()}
    before = groups[0]["params"]
    groups[0]["params"] = [p for p in before if id(p) not in new]
    groups[1]["params"] = [p for p in before if id(p) in new]
    logger.info("The learning rate of new layers applies to %s", new_layers)
