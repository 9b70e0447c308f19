"""Config keys of the plugin: ``add_selcon_config`` adds, ``complete_config`` checks them.

A method's options become keys of ``MODEL.SELCON`` by their upper-case names, a labeler's
keys of ``MODEL.SELCON.CLUSTERING``: see the constructors for meaning and legal range,
configs/README.md for the tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from fastreid.config import CfgNode

from selcon_plugin.clustering import (
    Labeler,
    LabelFilter,
    OutlierPolicy,
    ReliabilityFilter,
    SingleCameraFilter,
    build_labeler,
    labeler_names,
    labeler_options,
)
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.methods import method_class, method_names, method_options
from selcon_plugin.options import Choice, Interval, Option
from selcon_plugin.samplers import planner_names

logger = logging.getLogger(__name__)


# Words of MODEL.SELCON.SAMPLER besides the planners of selcon_plugin.samplers.
_AUTO, STREAM_SAMPLER = "auto", "stream"


def adapter_options() -> dict[str, Option]:
    """Return the keys of ``MODEL.SELCON`` that belong to the adapter, not to a method."""
    samplers = (_AUTO, STREAM_SAMPLER, *planner_names())
    options = (
        # Read anew each time: a script may register a method of its own after the import.
        Option("METHOD", "SelectiveContrastive", str, Choice(tuple(method_names()))),
        Option("NUM_PARTS", 8, int, Interval(0)),
        Option("PROJECT_GLOBAL", True, bool, None),
        Option("TEST_CAMERA_TERM", False, bool, None),
        Option("DIAGNOSTICS_PERIOD", 20, int, Interval(0)),
        Option("KEEP_CHECKPOINTS", 0, int, Interval(0)),
        Option("SAMPLER", _AUTO, str, Choice(samplers)),
        Option("OUTLIER_SHARE", 0.0, float, Interval(0, 1, below=True)),
        Option("ITERS_PER_EPOCH", 0, int, Interval(0)),
        Option("MICRO_BATCHES", 1, int, Interval(1)),
        Option("GHOST_BATCH_SIZE", 0, int, Interval(0)),
        Option("EMA_DECAY", 0.0, float, Interval(0, 1, below=True)),
        Option("SEED", 0, int, Interval(0)),
    )
    return {option.name: option for option in options}


def clustering_options() -> dict[str, Option]:
    """Return the keys of ``MODEL.SELCON.CLUSTERING`` that do not belong to a labeler."""
    options = (
        Option("LABELER", "DBSCAN", str, Choice(tuple(labeler_names()))),
        Option("PERIOD", 1, int, Interval(1)),
        Option("FEATURES", "global", str, Choice(("global", "fused"))),
        Option("RELIABILITY", False, bool, None),
        Option("DROP_SINGLE_CAMERA", False, bool, None),
        Option("OUTLIERS", "drop", str, Choice(("drop", "singleton", "nearest"))),
    )
    return {option.name: option for option in options}


def _own_method_options(name: str) -> dict[str, Option]:
    """Return a method's options without the seed, which is the whole run's."""
    return {key: o for key, o in method_options(name).items() if key != "seed"}


_OptionsOf = Callable[[str], Mapping[str, Option]]


def _shared_defaults(names: Sequence[str], options_of: _OptionsOf) -> dict[str, Any]:
    """Collect the options of all methods or labelers by key."""
    # None where they differ in their default, and where a word is legal besides a number:
    # yacs lets a key change its type only if its default is None.
    defaults: dict[str, Any] = {}
    for name in names:
        for option in options_of(name).values():
            key = option.name.upper()
            same = key not in defaults or defaults[key] == option.default
            defaults[key] = option.default if same and not option.words else None
    return defaults


def _selected_options(
    node: CfgNode,
    label: str,
    kind: str,
    name: str,
    names: Sequence[str],
    options_of: _OptionsOf,
) -> dict[str, Any]:
    """Read the options of one method or labeler from its node, checked."""
    known = options_of(name)
    values = {}
    for key, default in _shared_defaults(names, options_of).items():
        value = node[key]
        if key.lower() in known:
            if value is not None:
                option = known[key.lower()]
                values[option.name] = option.check(value, label=f"{label}.{key}")
        elif value != default:
            raise ValueError(
                f"{label}.{key} is {value!r}, but {kind} {name} has no such option; it has "
                f"{', '.join(other.upper() for other in known)}"
            )
    return values


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
    for key, default in _shared_defaults(method_names(), _own_method_options).items():
        setattr(cfg.MODEL.SELCON, key, default)
    cfg.MODEL.SELCON.CLUSTERING = CfgNode()
    for option in clustering_options().values():
        setattr(cfg.MODEL.SELCON.CLUSTERING, option.name, option.default)
    for key, default in _shared_defaults(labeler_names(), labeler_options).items():
        setattr(cfg.MODEL.SELCON.CLUSTERING, key, default)

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


def _fill_in(node: CfgNode, options: Mapping[str, Option]) -> None:
    """Put a default where None stood for it, so that the config says what is used."""
    for name, option in options.items():
        if node[name.upper()] is None:
            node[name.upper()] = option.default


@contextlib.contextmanager
def of_any_type(cfg: CfgNode) -> Iterator[None]:
    """Let a merge change the type of the keys that take several, such as ``EPS: auto``.

    yacs compares a value with the one that stands there: after a file's 0.5 the word "auto"
    would be refused.

    Args:
        cfg: Config that is merged into inside the ``with`` block.

    Yields:
        Nothing.
    """
    node = cfg.MODEL.SELCON
    free = [
        (owner, key)
        for owner, defaults in (
            (node, _shared_defaults(method_names(), _own_method_options)),
            (node.CLUSTERING, _shared_defaults(labeler_names(), labeler_options)),
        )
        for key, default in defaults.items()
        if default is None
    ]
    before = [owner[key] for owner, key in free]
    for owner, key in free:
        owner[key] = None
    try:
        yield
    finally:
        for (owner, key), value in zip(free, before, strict=True):
            if owner[key] is None:
                owner[key] = value


def describe_key(key: str) -> str:
    """Say in words what is legal for a key of ``MODEL.SELCON``; ``""`` for other keys.

    Args:
        key: Full key, for instance ``MODEL.SELCON.TEMPERATURE``.

    Returns:
        For instance "a number > 0".
    """
    node, _, name = key.rpartition(".")
    if node == "MODEL.SELCON":
        known = adapter_options()
        names, options_of = method_names(), _own_method_options
    elif node == "MODEL.SELCON.CLUSTERING":
        known = clustering_options()
        names, options_of = labeler_names(), labeler_options
    else:
        return ""
    for owner in names:
        known.update({o.name.upper(): o for o in options_of(owner).values()})
    return known[name].describe() if name in known else ""


def selected_method_options(cfg: CfgNode) -> dict[str, Any]:
    """Read the options of the chosen method from ``MODEL.SELCON``, checked.

    Args:
        cfg: Config with the plugin's keys.

    Returns:
        Constructor arguments of the method.

    Raises:
        ValueError: If a value is illegal (names key, value and legal range), or if a key
            was set that the chosen method does not have.
    """  # noqa: DOC502  (raised by what this calls)
    node = cfg.MODEL.SELCON
    options = _selected_options(
        node, "MODEL.SELCON", "method", node.METHOD, method_names(), _own_method_options
    )
    if "seed" in method_options(node.METHOD):
        options["seed"] = node.SEED
    return options


def selected_labeler_options(cfg: CfgNode) -> dict[str, Any]:
    """Read the options of the chosen labeler from ``MODEL.SELCON.CLUSTERING``, checked.

    Args:
        cfg: Config with the plugin's keys.

    Returns:
        Constructor arguments of the labeler.

    Raises:
        ValueError: If a value is illegal (names key, value and legal range), or if a key
            was set that the chosen labeler does not have.
    """  # noqa: DOC502  (raised by what this calls)
    node = cfg.MODEL.SELCON.CLUSTERING
    label = "MODEL.SELCON.CLUSTERING"
    return _selected_options(
        node, label, "labeler", node.LABELER, labeler_names(), labeler_options
    )


def build_configured_labeler(cfg: CfgNode) -> Labeler:
    """Build the labeler of ``MODEL.SELCON.CLUSTERING`` with its filters.

    Args:
        cfg: Complete config.

    Returns:
        The labeler.
    """
    node = cfg.MODEL.SELCON.CLUSTERING
    filters: list[LabelFilter] = []
    if node.RELIABILITY:
        filters.append(ReliabilityFilter())
    if node.DROP_SINGLE_CAMERA:
        filters.append(SingleCameraFilter())
    if node.OUTLIERS != "drop":
        filters.append(OutlierPolicy(node.OUTLIERS))
    options = selected_labeler_options(cfg)
    return build_labeler(node.LABELER, filters=filters, **options)


def sampler_name(cfg: CfgNode) -> str:
    """Return the sampler that draws the batches: the method's own for "auto".

    Args:
        cfg: Config with the plugin's keys.

    Returns:
        ``STREAM_SAMPLER`` or the name of a planner.
    """
    name: str = cfg.MODEL.SELCON.SAMPLER
    return method_class(cfg.MODEL.SELCON.METHOD).default_sampler if name == _AUTO else name


def _check_combinations(cfg: CfgNode) -> None:
    """Refuse what each option's own range cannot."""
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
    if node.TEST_CAMERA_TERM and (cfg.TEST.RERANK.ENABLED or cfg.TEST.AQE.ENABLED):
        raise ValueError(
            "MODEL.SELCON.TEST_CAMERA_TERM cannot be combined with TEST.RERANK or "
            "TEST.AQE: both compare gallery images with each other, where the term has no "
            "meaning"
        )


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
    """  # noqa: DOC502  (raised by what this calls)
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    if "SELCON" not in cfg.MODEL:
        add_selcon_config(cfg)
    for name, option in adapter_options().items():
        option.check(cfg.MODEL.SELCON[name], label=f"MODEL.SELCON.{name}")
    for name, option in clustering_options().items():
        value = cfg.MODEL.SELCON.CLUSTERING[name]
        option.check(value, label=f"MODEL.SELCON.CLUSTERING.{name}")
    selected_method_options(cfg)
    selected_labeler_options(cfg)
    node = cfg.MODEL.SELCON
    _fill_in(node, _own_method_options(node.METHOD))
    _fill_in(node.CLUSTERING, labeler_options(node.CLUSTERING.LABELER))
    _check_combinations(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is cuda, but CUDA is not available: using the CPU")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        logger.warning("SOLVER.AMP.ENABLED needs CUDA: training in float32")
        cfg.SOLVER.AMP.ENABLED = False
    if frozen:
        cfg.freeze()
    return cfg
