"""Config of a run from a script, so that the plugin's commands can load its network."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from yacs.config import CfgNode

from selcon_plugin.config.keys import clustering_options, run_options
from selcon_plugin.torchreid_ext.config import KEYS, get_default_config
from selcon_plugin.torchreid_ext.models import SelConModel
from selcon_plugin.torchreid_ext.options import MODEL_OPTIONS, EngineOptions
from selcon_plugin.torchreid_ext.run_arguments import CONFIG_KEYS

logger = logging.getLogger(__name__)

NOTICE = (
    "# Written for a run from a script, so that selcon extract, export, search and report\n"
    "# can load its network. Settings that the script did not pass on are the defaults.\n"
)
# torchreid's names of its transforms.
_TRANSFORMS = {
    "RandomHorizontalFlip": "random_flip",
    "Random2DTranslation": "random_crop",
    "RandomPatch": "random_patch",
    "ColorJitter": "color_jitter",
    "RandomErasing": "random_erase",
}
_OPTIMIZERS = {
    "Adam": "adam",
    "SGD": "sgd",
    "RMSprop": "rmsprop",
    "RAdam": "radam",
}


def config_of_script(
    network: SelConModel,
    datamanager: Any,
    options: EngineOptions,
    arguments: Mapping[str, Any],
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    num_instances: int,
) -> CfgNode | None:
    """Describe the run of a script as a config.

    Args:
        network: The network.
        datamanager: torchreid's data manager.
        options: Checked options of the engine.
        arguments: Arguments of torchreid's ``run`` by name.
        optimizer: Optimizer of the run.
        scheduler: Schedule of the run or None.
        num_instances: Images of each cluster in a batch.

    Returns:
        Config with which the network can be built; None if the name of its model is
        unknown.
    """
    if not network.build_options.get("name"):
        return None
    values = {
        "model.name": network.build_options["name"],
        "model.pretrained": False,
        "use_gpu": network.device.type == "cuda",
        "sampler.num_instances": num_instances,
        **{
            CONFIG_KEYS[name]: value
            for name, value in arguments.items()
            if name in CONFIG_KEYS and value is not None
        },
        **_of_data(datamanager),
        **_of_optimizer(optimizer, scheduler),
        "data.save_dir": str(arguments.get("save_dir", "log")),
        **{
            f"{KEYS.path}.{name}": value
            for name, value in (_of_options(options) | _of_head(network)).items()
        },
    }
    cfg = get_default_config()
    for key, value in values.items():
        *nodes, name = key.split(".")
        node = cfg
        for part in nodes:
            node = node[part]
        node[name] = value
    return cfg


def _of_data(datamanager: Any) -> dict[str, Any]:
    trainset = datamanager.train_loader.dataset
    found = {
        "data.sources": list(datamanager.sources),
        "data.targets": list(datamanager.targets),
        "data.height": int(datamanager.height),
        "data.width": int(datamanager.width),
        "data.workers": datamanager.train_loader.num_workers,
        "data.combineall": bool(getattr(trainset, "combineall", False)),
        "train.batch_size": datamanager.train_loader.batch_size,
        "data.transforms": [
            _TRANSFORMS[type(transform).__name__]
            for transform in datamanager.transform_tr.transforms
            if type(transform).__name__ in _TRANSFORMS
        ],
    }
    for loaders in datamanager.test_loader.values():
        found["test.batch_size"] = loaders["query"].batch_size
    for transform in datamanager.transform_te.transforms:
        if hasattr(transform, "mean") and hasattr(transform, "std"):
            found["data.norm_mean"] = [float(value) for value in transform.mean]
            found["data.norm_std"] = [float(value) for value in transform.std]
    root = getattr(trainset, "root", "")
    return found | ({"data.root": str(root)} if root else {})


def _of_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    group = optimizer.param_groups[-1]
    name = _OPTIMIZERS.get(type(optimizer).__name__, "")
    found = {
        "train.optim": "amsgrad" if group.get("amsgrad") else name,
        "train.lr": float(group.get("initial_lr", group["lr"])),
        "train.weight_decay": float(group.get("weight_decay", 0.0)),
    }
    kind = type(scheduler).__name__
    if kind == "StepLR":
        found |= {"train.stepsize": [scheduler.step_size], "train.gamma": scheduler.gamma}
    elif kind == "MultiStepLR":
        found |= {
            "train.lr_scheduler": "multi_step",
            "train.stepsize": sorted(scheduler.milestones),
            "train.gamma": scheduler.gamma,
        }
    elif kind == "CosineAnnealingLR":
        found["train.lr_scheduler"] = "cosine"
    return {key: value for key, value in found.items() if value != ""}


def _of_options(options: EngineOptions) -> dict[str, Any]:
    run = {
        name: getattr(options.run, name)
        for name in run_options()
        if name not in MODEL_OPTIONS
    }
    clustering = {n: getattr(options.clustering, n) for n in clustering_options()}
    clustering |= options.labeler_options
    method = {n: v for n, v in options.method.items() if n != "seed"}
    return {**run, **method, **{f"clustering.{n}": v for n, v in clustering.items()}}


def _of_head(network: SelConModel) -> dict[str, Any]:
    head = network.heads
    found = {n: v for n, v in network.build_options.items() if n != "name"}
    return {**found, "num_parts": head.num_parts, "embedding_dim": head.global_dim}
