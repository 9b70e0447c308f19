"""Config keys of the plugin in FastReID, their defaults and their check.

A method's options become keys of ``MODEL.SELCON`` by their upper-case names, a labeler's
options keys of ``MODEL.SELCON.CLUSTERING``. The constructors document meaning and valid
range; configs/README.md has the tables.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import yaml
from fastreid.config import CfgNode, get_cfg
from fastreid.modeling.backbones import BACKBONE_REGISTRY
from fastreid.modeling.heads import REID_HEADS_REGISTRY, EmbeddingHead
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY

from selcon_plugin.config.checks import (
    check_device,
    check_name,
    flatten_config,
    is_checked,
    mark_checked,
    value_of,
)
from selcon_plugin.config.importing import add_imported_keys
from selcon_plugin.config.keys import CAMERA_PATTERN, ConfigKeys, sampler_of
from selcon_plugin.config.recording import unrecorded
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.fastreid_ext.host_values import check_host_values, follow_training_data
from selcon_plugin.methods import method_options
from selcon_plugin.options import Choice, option_table, options_of

logger = logging.getLogger(__name__)


_DEFAULT_DATASET = get_cfg().TEST.PRECISE_BN.DATASET
FLOAT16, BFLOAT16 = "float16", "bfloat16"


# The plugin's keys in the format of FastReID's config.
KEYS = ConfigKeys(
    "MODEL.SELCON",
    str.upper,
    extra=option_table(
        {
            "test_camera_term": (
                False,
                None,
                "whether to add `SAME_CAMERA_PENALTY` at test time too. It uses camera ids "
                "of the test set, which must be stated next to the metrics",
            )
        }
    ),
)
# Keys outside of MODEL.SELCON.
OWN_OPTIONS = (
    *option_table(
        {
            "MODEL.BACKBONE.TIMM_NAME": (
                "",
                None,
                "timm model for `MODEL.BACKBONE.NAME: build_timm_backbone`",
            ),
            "MODEL.BACKBONE.TORCHREID_NAME": (
                "",
                None,
                "torchreid model for `MODEL.BACKBONE.NAME: build_torchreid_backbone`, such "
                "as `osnet_ain_x1_0`",
            ),
            "DATASETS.IMAGE_FOLDER.ROOT": (
                "",
                None,
                "folder of the data set `ImageFolderReID`",
            ),
            "DATASETS.IMAGE_FOLDER.CAMERA_PATTERN": ("", None, CAMERA_PATTERN),
        }
    ),
    *(
        replace(option, name=f"DATASETS.SYNTHETIC_PERSONS.{option.name.upper()}")
        for option in options_of(SyntheticPersonsSpec).values()
    ),
    *option_table(
        {
            "SOLVER.AMP.DTYPE": (
                FLOAT16,
                Choice((FLOAT16, BFLOAT16)),
                "data type of mixed precision (`SOLVER.AMP.ENABLED`), in steps and for the "
                "clustered features; `bfloat16` needs no loss scale and works on a CPU",
            ),
            # FastReID's verify_results reads this key, but its defaults lack it.
            "TEST.EXPECTED_RESULTS": (
                [],
                None,
                "rows `[data set, metric, value, tolerance]`; the run fails if a result "
                "deviates by more than the tolerance",
            ),
        }
    ),
)
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.HEADS.NAME": REID_HEADS_REGISTRY,
}


def add_selcon_config(cfg: CfgNode) -> CfgNode:
    """Add the plugin's keys, with their defaults, to a FastReID config.

    Call it after ``get_cfg()`` and before merging a file that sets any of these keys. Only
    the given config changes.

    Args:
        cfg: FastReID config, which is changed in place.

    Returns:
        The same config.
    """
    cfg.MODEL.SELCON = CfgNode({**KEYS.defaults(), **KEYS.former_keys()})
    for option in OWN_OPTIONS:
        *nodes, name = option.name.split(".")
        node = cfg
        for part in nodes:
            node = node.setdefault(part, CfgNode())
        node[name] = copy.copy(option.default)
    if cfg.TEST.PRECISE_BN.DATASET == _DEFAULT_DATASET:
        cfg.TEST.PRECISE_BN.DATASET = ""  # follows DATASETS.NAMES
    return cfg


def default_config() -> CfgNode:
    """Return FastReID's defaults with the keys of imported files and of the plugin."""
    return add_selcon_config(add_imported_keys(get_cfg()))


def selected_method_options(cfg: CfgNode) -> dict[str, Any]:
    """Read the options of the selected method from ``MODEL.SELCON``.

    Args:
        cfg: Checked config with the plugin's keys.

    Returns:
        Constructor arguments of the method.
    """
    return KEYS.selected(cfg.MODEL.SELCON, "method")


def sampler_name(cfg: CfgNode) -> str:
    """Return the name of the batch sampler, which for "auto" is the method's own.

    Args:
        cfg: Config with the plugin's keys.

    Returns:
        ``STREAM_SAMPLER`` or the name of a planner.
    """
    return sampler_of(cfg.MODEL.SELCON.METHOD, cfg.MODEL.SELCON.SAMPLER)


def _check_combinations(cfg: CfgNode) -> None:
    """Refuse combinations of options that are valid on their own."""
    node, batch_size = cfg.MODEL.SELCON, cfg.SOLVER.IMS_PER_BATCH
    if batch_size % node.MICRO_BATCHES:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({batch_size}) must be a multiple of "
            f"MODEL.SELCON.MICRO_BATCHES ({node.MICRO_BATCHES})"
        )
    if node.GHOST_BATCH_SIZE == 1:
        raise ValueError(
            "MODEL.SELCON.GHOST_BATCH_SIZE must be 0 (off) or at least 2, got 1: one image "
            "has no batch statistics"
        )
    if node.TEST_CAMERA_TERM and "same_camera_penalty" not in method_options(node.METHOD):
        raise ValueError(
            "MODEL.SELCON.TEST_CAMERA_TERM adds SAME_CAMERA_PENALTY at test time, which "
            f"the method {node.METHOD} does not have: set it to False"
        )
    if node.TEST_CAMERA_TERM and (cfg.TEST.RERANK.ENABLED or cfg.TEST.AQE.ENABLED):
        raise ValueError(
            "MODEL.SELCON.TEST_CAMERA_TERM cannot be combined with TEST.RERANK or "
            "TEST.AQE: both compare gallery images with each other, where the term has no "
            "meaning"
        )


def _check_host_keys(cfg: CfgNode) -> None:
    """Refuse values and names on which FastReID would fail late, or without a reason."""
    check_host_values(cfg, OWN_OPTIONS)
    check_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
    for key, registry in _REGISTRIES.items():
        check_name(key, value_of(cfg, key), registry._obj_map)
    head = REID_HEADS_REGISTRY.get(cfg.MODEL.HEADS.NAME)
    if head is not EmbeddingHead and head.__module__.startswith("fastreid."):
        raise ValueError(
            f"MODEL.HEADS.NAME {cfg.MODEL.HEADS.NAME!r} classifies identities: set it to "
            "GlobalPartHead"
        )


def complete_config(cfg: CfgNode) -> CfgNode:
    """Return a checked copy of a config, with all keys that a SelCon run needs.

    This is the only check: every function that builds from a config calls it. For a config
    that it has returned, it only makes a copy, unless a value has changed since. It adds
    the plugin's keys if the caller's script did not, and moves a run without CUDA to the
    CPU, where float16 is not available.

    Args:
        cfg: FastReID config, which is not changed.

    Returns:
        Checked config, frozen if the given one was.

    Raises:
        ValueError: If a key of ``MODEL.SELCON``, or a key of FastReID that a run needs, is
            invalid; the message names key, value and the valid values.
    """  # noqa: DOC502  (raised by the functions called here)
    if is_checked(cfg):
        return cfg.clone()
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    if "SELCON" not in cfg.MODEL:
        add_selcon_config(cfg)
    follow_training_data(cfg)
    with unrecorded(cfg):
        KEYS.check(cfg.MODEL.SELCON)
        _check_host_keys(cfg)
        _check_combinations(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        others = "; for the Apple GPU set it to mps" * torch.backends.mps.is_available()
        logger.warning(
            "MODEL.DEVICE is cuda, but CUDA is not available: using the CPU%s", others
        )
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED:
        _check_precision(cfg)
    mark_checked(cfg)
    if frozen:
        cfg.freeze()
    return cfg


def _check_precision(cfg: CfgNode) -> None:
    """Disable a precision that a CPU or an Apple GPU lacks; refuse one that a GPU lacks."""
    dtype = cfg.SOLVER.AMP.DTYPE
    if cfg.MODEL.DEVICE == "mps":
        logger.warning("SOLVER.AMP.ENABLED needs CUDA or a CPU: training in float32 on mps")
        cfg.SOLVER.AMP.ENABLED = False
        return
    if cfg.MODEL.DEVICE == "cpu" and dtype == FLOAT16:
        logger.warning(
            "SOLVER.AMP.ENABLED in float16 needs CUDA: training in float32. On a CPU use "
            "SOLVER.AMP.DTYPE bfloat16"
        )
        cfg.SOLVER.AMP.ENABLED = False
    if dtype == BFLOAT16 and cfg.MODEL.DEVICE != "cpu" and not _gpu_does_bfloat16():
        raise ValueError(
            f"SOLVER.AMP.DTYPE is {dtype}, which {torch.cuda.get_device_name()} cannot "
            "compute in: set it to float16"
        )


def _gpu_does_bfloat16() -> bool:
    # PyTorch's own check also returns True where bfloat16 is emulated, which is slow.
    return torch.cuda.get_device_capability() >= (8, 0)


def default_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default config with the defaults of another config's method.

    Args:
        settings: Values of the other config by full keys.

    Returns:
        Defaults by full keys.
    """
    cfg = default_config()
    KEYS.fill_defaults(cfg.MODEL.SELCON, settings)
    return flatten_config(yaml.safe_load(cfg.dump()))
