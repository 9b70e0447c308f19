"""Config keys of the plugin: ``add_selcon_config`` adds, ``complete_config`` checks them.

A method's options become keys of ``MODEL.SELCON`` by their upper-case names: see the
method's constructor for meaning and legal range, configs/README.md for the table.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from fastreid.config import CfgNode

from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.methods import method_names, method_options
from selcon_plugin.options import Choice, Interval, Option

logger = logging.getLogger(__name__)


def adapter_options() -> dict[str, Option]:
    """Return the keys of ``MODEL.SELCON`` that belong to the adapter, not to a method."""
    options = (
        # Read anew each time: a script may register a method of its own after the import.
        Option("METHOD", "SelectiveContrastive", str, Choice(tuple(method_names()))),
        Option("NUM_PARTS", 8, int, Interval(0)),
        Option("PROJECT_GLOBAL", True, bool, None),
        Option("TEST_CAMERA_TERM", False, bool, None),
        Option("DIAGNOSTICS_PERIOD", 20, int, Interval(0)),
        Option("KEEP_CHECKPOINTS", 0, int, Interval(0)),
    )
    return {option.name: option for option in options}


def _method_defaults() -> dict[str, Any]:
    """Collect the options of all methods; None where methods differ in their default."""
    defaults: dict[str, Any] = {}
    for name in method_names():
        for option in method_options(name).values():
            key = option.name.upper()
            same = key not in defaults or defaults[key] == option.default
            defaults[key] = option.default if same else None
    return defaults


def add_selcon_config(cfg: CfgNode) -> CfgNode:
    """Add the plugin's keys, with their defaults, to a FastReID config.

    Call it after ``get_cfg()`` and before merging a file that sets any of these keys. Only
    the given config is changed.

    Args:
        cfg: FastReID config; changed in place.

    Returns:
        The same config.
    """
    cfg.MODEL.SELCON = CfgNode()
    for option in adapter_options().values():
        setattr(cfg.MODEL.SELCON, option.name, option.default)
    for key, default in _method_defaults().items():
        setattr(cfg.MODEL.SELCON, key, default)

    # Name of the timm model for MODEL.BACKBONE.NAME build_timm_backbone.
    cfg.MODEL.BACKBONE.TIMM_NAME = ""

    # Data set ImageFolderReID: any folder of images.
    cfg.DATASETS.IMAGE_FOLDER = CfgNode()
    cfg.DATASETS.IMAGE_FOLDER.ROOT = ""
    # Regular expression whose first group is the camera, searched in the path below ROOT.
    # "" takes the first sub-folder, "none" leaves cameras out.
    cfg.DATASETS.IMAGE_FOLDER.CAMERA_PATTERN = ""

    # Data set SyntheticPersons, drawn when it is absent.
    cfg.DATASETS.SYNTHETIC_PERSONS = CfgNode()
    for field, value in dataclasses.asdict(SyntheticPersonsSpec()).items():
        setattr(cfg.DATASETS.SYNTHETIC_PERSONS, field.upper(), value)

    # FastReID's verify_results reads this key, its defaults lack it: rows of
    # [data set, metric, expected value, tolerance].
    cfg.TEST.EXPECTED_RESULTS = []
    return cfg


def describe_key(key: str) -> str:
    """Say in words what is legal for a key of ``MODEL.SELCON``; ``""`` for other keys.

    Args:
        key: Full key, for instance ``MODEL.SELCON.TEMPERATURE``.

    Returns:
        For instance "a number > 0".
    """
    node, _, name = key.rpartition(".")
    if node != "MODEL.SELCON":
        return ""
    known = adapter_options()
    for method in method_names():
        known.update({o.name.upper(): o for o in method_options(method).values()})
    return known[name].describe() if name in known else ""


def selected_method_options(cfg: CfgNode) -> dict[str, Any]:
    """Read the options of the chosen method from ``MODEL.SELCON``, checked.

    Args:
        cfg: Config with the plugin's keys.

    Returns:
        Constructor arguments of the method.

    Raises:
        ValueError: If a value is illegal (names key, value and legal range), or if a key
        was
            set that the chosen method does not have.
    """
    node = cfg.MODEL.SELCON
    known = method_options(node.METHOD)
    values = {}
    for key, default in _method_defaults().items():
        value = node[key]
        if key.lower() in known:
            if value is not None:
                option = known[key.lower()]
                values[option.name] = option.check(value, label=f"MODEL.SELCON.{key}")
        elif value != default:
            raise ValueError(
                f"MODEL.SELCON.{key} is {value!r}, but method {node.METHOD} has no such "
                f"option; it has {', '.join(name.upper() for name in known)}"
            )
    return values


def complete_config(cfg: CfgNode) -> CfgNode:
    """Return a checked copy of a config, with everything a SelCon run needs.

    Adds the plugin's keys if the caller's script did not; moves a run without CUDA to the
    CPU, where FastReID has no mixed precision.

    Args:
        cfg: FastReID config; not changed.

    Returns:
        Checked config, frozen if the given one was.

    Raises:
        ValueError: If a key of ``MODEL.SELCON`` is illegal; names key, value and legal
        range.
    """
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    if "SELCON" not in cfg.MODEL:
        add_selcon_config(cfg)
    for name, option in adapter_options().items():
        option.check(cfg.MODEL.SELCON[name], label=f"MODEL.SELCON.{name}")
    selected_method_options(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is cuda, but CUDA is not available: using the CPU")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        logger.warning("SOLVER.AMP.ENABLED needs CUDA: training in float32")
        cfg.SOLVER.AMP.ENABLED = False
    if cfg.MODEL.SELCON.TEST_CAMERA_TERM and (
        cfg.TEST.RERANK.ENABLED or cfg.TEST.AQE.ENABLED
    ):
        raise ValueError(
            "MODEL.SELCON.TEST_CAMERA_TERM cannot be combined with TEST.RERANK or "
            "TEST.AQE: both compare gallery images with each other, where the term has no "
            "meaning"
        )
    if frozen:
        cfg.freeze()
    return cfg
