"""A trained network as a plain torchreid model, by torchreid's own builder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from selcon_plugin.config.host_data import PlainNetwork
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.timm import TIMM_PREFIX
from selcon_plugin.models.torchreid import build_plain_model
from selcon_plugin.torchreid_ext.config import OWN_OPTIONS
from selcon_plugin.torchreid_ext.datasets import IMAGE_FOLDER, SYNTHETIC_PERSONS
from selcon_plugin.torchreid_ext.inference import load_network
from selcon_plugin.torchreid_ext.models import SelConModel

__all__ = ["plain_network"]

_OTHERWISE = "Use --onnx or --torchscript, which write any network"


def plain_network(cfg: CfgNode, weights: str | Path) -> PlainNetwork:
    """Convert a network to the model that torchreid's factory builds under its name.

    Args:
        cfg: Complete config of the network.
        weights: Its checkpoint.

    Returns:
        The network, its weights and its config.

    Raises:
        ValueError: If no model of torchreid computes the features of the network.
    """
    trained = load_network(cfg, weights, torch.device("cpu"))
    model = trained.network
    if not isinstance(model, SelConModel):
        if cfg.model.name.startswith(TIMM_PREFIX):
            raise ValueError(
                f"torchreid has no model {cfg.model.name}, to which {weights} belongs. "
                f"{_OTHERWISE}"
            )
        raise ValueError(f"{weights} is a plain torchreid network already")
    if model.build_options["feature"] != "model":
        raise ValueError(
            f"torchreid's {cfg.model.name} has no layers for the head of this plugin "
            "(projection and normalization without ReLU, parts): train with selcon.feature "
            f"model, which trains the model's own feature. {_OTHERWISE}"
        )
    inner = model.backbone.model
    assert isinstance(inner, nn.Module)
    plain = build_plain_model(cfg.model.name)
    state = {**plain.state_dict(), **inner.state_dict()}
    # The classifier of one class, and what else the feature does not depend on.
    plain.load_state_dict(state)
    network = InferenceNetwork(
        plain, trained.preprocessing, method=trained.method, host="torchreid"
    )
    config, notes = _plain_config(cfg)
    return PlainNetwork(
        network=network,
        trained=trained,
        checkpoint={"state_dict": plain.state_dict(), "epoch": 0},
        config=config,
        weights_key="model.load_weights",
        output_key="data.save_dir",
        whole=True,
        notes=notes,
    )


def _plain_config(cfg: CfgNode) -> tuple[CfgNode, list[str]]:
    """Return the config in torchreid's own keys, and what differs from the run's."""
    notes = []
    plain = cfg.clone()
    plain.defrost()
    for node in {"selcon", *(option.name.partition(".")[0] for option in OWN_OPTIONS)}:
        plain.pop(node, None)
    plain.model.pretrained, plain.model.resume = False, ""
    plain.test.evaluate = True
    if not plain.test.normalize_feature and plain.test.dist_metric != "cosine":
        # Those of the run have unit length.
        notes.append("test.normalize_feature is True: the features had unit length")
        plain.test.normalize_feature = True
    plain.train.open_layers = plain.train.new_layers = ["classifier"]
    for key in ("sources", "targets"):
        own = [n for n in plain.data[key] if n not in (IMAGE_FOLDER, SYNTHETIC_PERSONS)]
        if len(own) < len(plain.data[key]):
            notes.append(f"data.{key} has none of this plugin's data sets: set yours")
        plain.data[key] = own or ["market1501"]
    return plain, notes
