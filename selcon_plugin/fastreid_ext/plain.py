"""A trained network in FastReID's own form: ``Baseline`` with its ``EmbeddingHead``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from fastreid.config import CfgNode, get_cfg
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.modeling.backbones import BACKBONE_REGISTRY
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY
from torch import Tensor, nn

from selcon_plugin.config.host_data import PlainNetwork
from selcon_plugin.fastreid_ext.inference import HostNetwork, load_network
from selcon_plugin.fastreid_ext.meta_arch import SelCon
from selcon_plugin.fastreid_ext.results import results_by_test_set
from selcon_plugin.fastreid_ext.trainer import SelConTrainer
from selcon_plugin.features import GlobalPartEmbedding
from selcon_plugin.models.inference import InferenceNetwork

__all__ = ["measure", "plain_network"]

_OTHERWISE = "Use --onnx or --torchscript, which write any network"


def plain_network(cfg: CfgNode, weights: str | Path, *, global_only: bool) -> PlainNetwork:
    """Convert a network to one that FastReID builds and evaluates without the plugin.

    The bias of the projection moves into the running mean of the normalization, so that the
    features are the same.

    Args:
        cfg: Complete config of the network.
        weights: Its checkpoint.
        global_only: Whether to leave out its parts.

    Returns:
        The network, its weights and its config.

    Raises:
        ValueError: If FastReID's own head or backbones cannot express the network.
    """
    trained = load_network(cfg, weights, torch.device("cpu"))
    model = trained.network
    if not isinstance(model, SelCon):
        raise ValueError(f"{weights} is a plain FastReID network already")
    _refuse_inexpressible(cfg, model, global_only=global_only)
    plain_cfg, notes = _plain_config(cfg, model)
    state = {
        f"backbone.{name}": tensor for name, tensor in model.backbone.state_dict().items()
    }
    state |= _head_weights(model.heads)
    baseline = META_ARCH_REGISTRY.get("Baseline")(_for_building(plain_cfg))
    differing = state.keys() ^ baseline.state_dict().keys()
    if differing:
        raise ValueError(
            f"FastReID's own {cfg.MODEL.BACKBONE.NAME} has other layers than the network, "
            f"such as {sorted(differing)[0]} (WAVE_BLOCK {cfg.MODEL.SELCON.WAVE_BLOCK}). "
            f"{_OTHERWISE}"
        )
    baseline.load_state_dict(state)
    network = InferenceNetwork(
        HostNetwork(baseline), trained.preprocessing, method=trained.method, host="fastreid"
    )
    return PlainNetwork(
        network=network,
        trained=_reference(model, trained, global_only=global_only),
        checkpoint={"model": state},
        config=plain_cfg,
        weights_key="MODEL.WEIGHTS",
        output_key="OUTPUT_DIR",
        whole=not model.heads.num_parts,
        notes=notes,
    )


def _refuse_inexpressible(cfg: CfgNode, model: SelCon, *, global_only: bool) -> None:
    name = cfg.MODEL.BACKBONE.NAME
    if not BACKBONE_REGISTRY.get(name).__module__.startswith("fastreid."):
        raise ValueError(
            f"MODEL.BACKBONE.NAME {name} is not one of FastReID's own backbones, so that "
            f"FastReID cannot build it without this plugin. {_OTHERWISE}"
        )
    head = model.heads
    if not isinstance(head, GlobalPartEmbedding):
        raise ValueError(
            f"the head {type(head).__name__} is not this plugin's: FastReID's "
            f"EmbeddingHead cannot replace it. {_OTHERWISE}"
        )
    if head.num_parts and not global_only:
        raise ValueError(
            f"the network has {head.num_parts} parts, which FastReID's EmbeddingHead does "
            "not: add --global-only to export its global branch, whose mAP is another one "
            f"and will be measured. {_OTHERWISE}"
        )
    if _bias(head) is not None and not hasattr(head.global_norm, "running_mean"):
        raise ValueError(
            f"MODEL.HEADS.NORM {cfg.MODEL.HEADS.NORM} cannot absorb the bias of the "
            f"projection, which FastReID's EmbeddingHead does not have. {_OTHERWISE}"
        )


def _bias(head: GlobalPartEmbedding) -> Tensor | None:
    projection = head.global_projection
    return projection.bias if isinstance(projection, nn.Linear) else None


def _head_weights(head: GlobalPartEmbedding) -> dict[str, Tensor]:
    """Return the global branch by the names of FastReID's ``EmbeddingHead``."""
    norm = {name: tensor.clone() for name, tensor in head.global_norm.state_dict().items()}
    bias, place, state = _bias(head), 0, {}
    if bias is not None:
        assert isinstance(head.global_projection, nn.Linear)
        weight = head.global_projection.weight.detach()
        state["heads.bottleneck.0.weight"] = weight[:, :, None, None].contiguous()
        norm["running_mean"] -= bias.detach()
        place = 1
    for name, tensor in norm.items():
        state[f"heads.bottleneck.{place}.{name}"] = tensor
    for name, tensor in head.pool.state_dict().items():
        state[f"heads.pool_layer.{name}"] = tensor
    state["heads.weight"] = torch.zeros(0, head.global_dim)  # no identities
    return state


def _plain_config(cfg: CfgNode, model: SelCon) -> tuple[CfgNode, list[str]]:
    """Return the config in FastReID's own keys, and what differs from the run's."""
    plain, notes = get_cfg(), []
    _take_over(plain, cfg)
    plain.MODEL.META_ARCHITECTURE = "Baseline"
    plain.MODEL.BACKBONE.FEAT_DIM = _channels(model)
    plain.MODEL.BACKBONE.PRETRAIN = False
    plain.MODEL.BACKBONE.PRETRAIN_PATH = ""
    plain.MODEL.HEADS.NAME = "EmbeddingHead"
    plain.MODEL.HEADS.NUM_CLASSES = 0
    projected = _bias(model.heads) is not None
    plain.MODEL.HEADS.EMBEDDING_DIM = model.heads.global_dim if projected else 0
    plain.MODEL.HEADS.WITH_BNNECK = True
    if plain.TEST.METRIC != "cosine":
        # FastReID's features have no unit length; those of the run had.
        notes.append(f"TEST.METRIC is cosine, which ranks as {plain.TEST.METRIC} did")
        plain.TEST.METRIC = "cosine"
    if plain.TEST.FLIP.ENABLED:
        notes.append("TEST.FLIP is off: FastReID averages features of any length")
        plain.TEST.FLIP.ENABLED = False
    for key in ("NAMES", "TESTS"):
        own = [n for n in plain.DATASETS[key] if not _is_of_plugin(n)]
        if len(own) < len(plain.DATASETS[key]):
            notes.append(f"DATASETS.{key} has none of this plugin's data sets: set yours")
        plain.DATASETS[key] = tuple(own) or ("Market1501",)
    precise = plain.TEST.PRECISE_BN
    if not precise.DATASET or _is_of_plugin(precise.DATASET):
        precise.DATASET = plain.DATASETS.NAMES[0]
    return plain, notes


def _channels(model: SelCon) -> int:
    head = model.heads
    projection = head.global_projection
    channels: int = (
        projection.in_features if isinstance(projection, nn.Linear) else head.global_dim
    )
    return channels


def _is_of_plugin(dataset: str) -> bool:
    return bool(DATASET_REGISTRY.get(dataset).__module__.startswith("selcon_plugin."))


def _take_over(plain: CfgNode, cfg: CfgNode) -> None:
    """Copy the values of all keys that FastReID itself has."""
    for key, value in plain.items():
        if isinstance(value, CfgNode):
            _take_over(value, cfg[key])
        else:
            plain[key] = cfg[key]


def _for_building(plain: CfgNode) -> CfgNode:
    cfg = plain.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


class _GlobalBranch(nn.Module):
    """The trained network without its parts."""

    def __init__(self, model: SelCon) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.embed(images).global_features
        return features


def _reference(
    model: SelCon, trained: InferenceNetwork, *, global_only: bool
) -> InferenceNetwork:
    """Return the trained network that the exported one must equal."""
    if not (global_only and model.heads.num_parts):
        return trained
    branch: Any = _GlobalBranch(model)
    return InferenceNetwork(
        branch, trained.preprocessing, method=trained.method, host=trained.host
    )


class _OnBatches(nn.Module):
    """A network that takes the batches of FastReID's test loader."""

    def __init__(self, network: InferenceNetwork) -> None:
        super().__init__()
        self.network = network
        self.mean = torch.tensor(network.preprocessing.pixel_mean).view(1, -1, 1, 1)
        self.std = torch.tensor(network.preprocessing.pixel_std).view(1, -1, 1, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        features: Tensor = self.network((batch["images"] - self.mean) / self.std)
        return features


def measure(cfg: CfgNode, network: InferenceNetwork) -> dict[str, Any]:
    """Evaluate a network on the test sets of a config.

    Args:
        cfg: Complete config.
        network: Network on the CPU.

    Returns:
        Metrics by test set.
    """
    cfg = _for_building(cfg)
    with tempfile.TemporaryDirectory() as folder:  # the ranks in that of the run stay
        cfg.OUTPUT_DIR = folder
        results = SelConTrainer.test(cfg, _OnBatches(network)) or {}
    return dict(results_by_test_set(cfg, results))
