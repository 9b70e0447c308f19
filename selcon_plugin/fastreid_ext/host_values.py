"""Valid values of FastReID's keys, and checks of keys that depend on each other.

FastReID detects most of these values late, after the training, or never.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastreid.config import CfgNode
from fastreid.data.datasets import DATASET_REGISTRY

from selcon_plugin.config.checks import check_finite, check_name, check_size, check_values
from selcon_plugin.config.keys import EMBEDDING_DIM
from selcon_plugin.options import Choice, Interval, Option, option_table

logger = logging.getLogger(__name__)


def _optimizer_names() -> tuple[str, ...]:
    return tuple(
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    )


_SCHEDULES = ("MultiStepLR", "CosineAnnealingLR")  # FastReID has arguments for these only
_FROM_0, _FROM_1 = Interval(0), Interval(1)
_ABOVE_0, _PROBABILITY = Interval(0, above=True), Interval(0, 1)
_STEPS, _EPOCHS = Interval(0, 10**9), Interval(1, 10**6)
HOST_OPTIONS = option_table(
    {
        "SOLVER.IMS_PER_BATCH": (
            64,
            _FROM_1,
            "images in a training batch, over all processes",
        ),
        "SOLVER.MAX_EPOCH": (120, _EPOCHS, "total number of epochs"),
        "SOLVER.BASE_LR": (0.01, _FROM_0, "learning rate after the warm-up"),
        "SOLVER.WEIGHT_DECAY": (0.0, _FROM_0, "weight decay"),
        "SOLVER.MOMENTUM": (0.9, Interval(0, 1, below=True), "momentum of SGD"),
        "SOLVER.WARMUP_ITERS": (0, _STEPS, "steps of the learning-rate warm-up"),
        "SOLVER.CHECKPOINT_PERIOD": (20, _FROM_1, "epochs between checkpoints"),
        "SOLVER.OPT": ("Adam", Choice(_optimizer_names()), "optimizer"),
        "SOLVER.SCHED": (
            "MultiStepLR",
            Choice(_SCHEDULES),
            "learning-rate schedule",
        ),
        "TEST.IMS_PER_BATCH": (
            64,
            _FROM_1,
            "images in a batch of extraction and evaluation",
        ),
        "TEST.EVAL_PERIOD": (
            20,
            _FROM_0,
            "epochs between evaluations; 0 evaluates only at the end",
        ),
        "DATALOADER.NUM_WORKERS": (8, _FROM_0, "processes that read images"),
        "DATALOADER.NUM_INSTANCE": (4, _FROM_1, "images K of each cluster in a batch"),
        "MODEL.HEADS.EMBEDDING_DIM": (0, _FROM_0, EMBEDDING_DIM),
    }
)
# Keys that are checked only: FastReID documents them.
_CHECKED: dict[str, tuple[Any, Interval | Choice | None, str]] = {
    "SOLVER.WEIGHT_DECAY_NORM": (0.0, _FROM_0, ""),
    "SOLVER.WEIGHT_DECAY_BIAS": (0.0, _FROM_0, ""),
    "SOLVER.BIAS_LR_FACTOR": (1.0, _FROM_0, ""),
    "SOLVER.HEADS_LR_FACTOR": (1.0, _FROM_0, ""),
    "SOLVER.GAMMA": (0.1, _ABOVE_0, ""),
    "SOLVER.ETA_MIN_LR": (0.0, _FROM_0, ""),
    "SOLVER.DELAY_EPOCHS": (0, Interval(0, 10**6), ""),
    "SOLVER.FREEZE_ITERS": (0, _STEPS, ""),
    "SOLVER.WARMUP_FACTOR": (0.1, _PROBABILITY, ""),
    "SOLVER.WARMUP_METHOD": ("linear", Choice(("linear", "constant", "exp")), ""),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("norm", Choice(("norm", "value")), ""),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (5.0, _ABOVE_0, ""),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (2.0, _ABOVE_0, ""),
    "TEST.METRIC": ("cosine", Choice(("cosine", "euclidean")), ""),
    "TEST.RERANK.K1": (20, _FROM_1, ""),
    "TEST.RERANK.K2": (6, _FROM_1, ""),
    "TEST.RERANK.LAMBDA": (0.3, _PROBABILITY, ""),
    "TEST.AQE.QE_K": (5, _FROM_1, ""),
    "TEST.AQE.QE_TIME": (1, _FROM_1, ""),
    "TEST.AQE.ALPHA": (3.0, _FROM_0, ""),
    "TEST.PRECISE_BN.NUM_ITER": (300, _FROM_1, ""),
    "INPUT.FLIP.PROB": (0.5, _PROBABILITY, ""),
    "INPUT.CJ.PROB": (0.5, _PROBABILITY, ""),
    "INPUT.REA.PROB": (0.5, _PROBABILITY, ""),
    "INPUT.RPT.PROB": (0.5, _PROBABILITY, ""),
    "INPUT.AUTOAUG.PROB": (0.0, _PROBABILITY, ""),
    "INPUT.AUGMIX.PROB": (0.0, _PROBABILITY, ""),
    "INPUT.PADDING.SIZE": (10, _FROM_0, ""),
}
_METRICS = ("Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "metric")
_ROC = tuple(f"TPR@FPR={rate:.0e}" for rate in (1e-4, 1e-3, 1e-2))


def check_host_values(cfg: CfgNode, own: Sequence[Option]) -> None:
    """Refuse values on which FastReID would fail late, or without naming the key.

    Args:
        cfg: Config with the plugin's keys.
        own: Options of the plugin outside of its node.

    Raises:
        ValueError: If a value is invalid; the message names key, value and valid values.
    """
    check_finite(cfg)
    check_values(cfg, (*HOST_OPTIONS, *option_table(_CHECKED), *own))
    check_sizes(cfg)
    _check_names(cfg)
    _check_steps(cfg.SOLVER.STEPS)
    _check_layers(cfg.MODEL.FREEZE_LAYERS)
    if not all(cfg.MODEL.PIXEL_STD):
        raise ValueError(
            f"MODEL.PIXEL_STD must not contain 0, got {list(cfg.MODEL.PIXEL_STD)}"
        )
    _check_expected(cfg)


def follow_training_data(cfg: CfgNode) -> None:
    """Name the data set of the precise statistics after the one that is trained on.

    FastReID's default is Market1501, whichever data set is trained on. The plugin's is an
    empty name, which stands for the first of ``DATASETS.NAMES``.

    Args:
        cfg: Config with the plugin's keys, which is changed in place.
    """
    precise, names = cfg.TEST.PRECISE_BN, cfg.DATASETS.NAMES
    if precise.ENABLED and not precise.DATASET and _are(str, names) and names:
        precise.DATASET = names[0]


def _check_names(cfg: CfgNode) -> None:
    for key in ("NAMES", "TESTS"):
        names = cfg.DATASETS[key]
        full = f"DATASETS.{key}"
        if not _are(str, names):
            raise ValueError(
                f'{full} must be a list of names, such as ("Market1501",), got {names!r}'
            )
        for name in names:
            check_name(full, name, DATASET_REGISTRY._obj_map)
            if names.count(name) > 1:
                raise ValueError(f"{full} names {name!r} twice: name it once")
    precise = cfg.TEST.PRECISE_BN
    if precise.ENABLED:
        check_name("TEST.PRECISE_BN.DATASET", precise.DATASET, DATASET_REGISTRY._obj_map)


def _check_steps(steps: Any) -> None:
    if not _are(int, steps) or list(steps) != sorted(steps) or (steps and steps[0] < 0):
        raise ValueError(
            f"SOLVER.STEPS must be epochs in ascending order, such as [30, 55], got "
            f"{steps!r}"
        )


def _check_layers(layers: Any) -> None:
    if not _are(str, layers):
        raise ValueError(
            f'MODEL.FREEZE_LAYERS must be a list of names, such as ["backbone"], got '
            f"{layers!r}"
        )
    for layer in layers:
        try:
            re.compile(layer)
        except re.error as error:
            raise ValueError(
                f"MODEL.FREEZE_LAYERS {layer!r} is not the start of a parameter's name: "
                f"{error}"
            ) from error


def _check_expected(cfg: CfgNode) -> None:
    """Refuse expectations that no evaluation can be compared with."""
    known = (*_METRICS, *(_ROC if cfg.TEST.ROC.ENABLED else ()))
    for row in cfg.TEST.EXPECTED_RESULTS:
        if not isinstance(row, list | tuple) or len(row) != 4:
            raise ValueError(
                "TEST.EXPECTED_RESULTS must be rows [data set, metric, value, tolerance], "
                f'such as ["Market1501", "mAP", 80.0, 0.5], got {row!r}'
            )
        name, metric, *numbers = row
        if name not in cfg.DATASETS.TESTS:
            raise ValueError(
                f"TEST.EXPECTED_RESULTS: {name!r} is not in DATASETS.TESTS "
                f"{tuple(cfg.DATASETS.TESTS)}"
            )
        check_name("TEST.EXPECTED_RESULTS", metric, known)
        if not _are((int, float), numbers) or numbers[1] < 0:
            raise ValueError(
                "TEST.EXPECTED_RESULTS: value and tolerance must be numbers, the tolerance "
                f">= 0, got {row!r}"
            )


def _are(kind: type | tuple[type, ...], values: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    )


# Numbers of neighbors by the node that enables them, and FastReID's default.
_NEIGHBORS: Mapping[str, Mapping[str, int]] = {
    "RERANK": {"K1": 20, "K2": 6},
    "AQE": {"QE_K": 5},
}


def with_fitting_neighbors(cfg: CfgNode, name: str, num_images: int) -> CfgNode:
    """Refuse more neighbors than a test set has images; lower the defaults to what fits.

    Args:
        cfg: Complete config.
        name: Name of the test set.
        num_images: Number of its images.

    Returns:
        The config for the evaluation of the test set; frozen as the given one.

    Raises:
        ValueError: If a value that is not the default is too large.
    """
    fitting = cfg.clone()
    fitting.defrost()
    for node, keys in _NEIGHBORS.items():
        for key, default in keys.items():
            value = cfg.TEST[node][key]
            if not cfg.TEST[node].ENABLED or value < num_images:
                continue
            full, most = f"TEST.{node}.{key}", num_images - 1
            if value != default:
                raise ValueError(
                    f"{full} is {value}, but {name} has {num_images} images: use at most "
                    f"{most}"
                )
            fitting.TEST[node][key] = most
            logger.info("%s is %d, the most that %s allows", full, most, name)
    if cfg.is_frozen():
        fitting.freeze()
    return fitting


def input_size(cfg: CfgNode) -> tuple[int, int]:
    """Return height and width of the network's input in training.

    FastReID also accepts one number, the length of the shorter side. It is the size of a
    square here, which determines what a network of a given size can be built for.

    Args:
        cfg: Config of FastReID.
    """
    crop = cfg.INPUT.CROP
    size = crop.SIZE if crop.ENABLED else cfg.INPUT.SIZE_TRAIN
    return size[0], size[-1]


def check_sizes(cfg: CfgNode) -> None:
    """Refuse sizes of images that are neither one whole number nor two.

    FastReID does not resize images to ``[0]`` or ``[0, 0]``. That is legal here where a
    crop gives them one size.

    Raises:
        ValueError: If a size is invalid; the message names its key.
    """  # noqa: DOC502  (raised by the functions called here)
    sizes = {
        "INPUT.SIZE_TRAIN": cfg.INPUT.SIZE_TRAIN,
        "INPUT.SIZE_TEST": cfg.INPUT.SIZE_TEST,
    }
    for key, size in list(sizes.items()):
        if isinstance(size, list | tuple) and list(size) in ([0], [0, 0]):
            _check_own_sizes(cfg, key)
            del sizes[key]
    if cfg.INPUT.CROP.ENABLED:
        sizes["INPUT.CROP.SIZE"] = cfg.INPUT.CROP.SIZE
    for key, size in sizes.items():
        is_list = isinstance(size, list | tuple)
        check_size(key, [*size, *size] if is_list and len(size) == 1 else size)


def _check_own_sizes(cfg: CfgNode, key: str) -> None:
    """Refuse images in their own size where nothing else gives them one size."""
    inputs, size = cfg.INPUT, list(cfg.INPUT[key.rpartition(".")[2]])
    if not inputs.CROP.ENABLED:
        raise ValueError(
            f"{key} {size} leaves each image in its own size, and images of several sizes "
            "make no batch: set it to height and width, such as [256, 128], or set "
            "INPUT.CROP.ENABLED to True and INPUT.CROP.SIZE to height and width"
        )
    if inputs.PADDING.ENABLED and key == "INPUT.SIZE_TRAIN":
        raise ValueError(
            f"{key} {size} cannot be combined with INPUT.PADDING, after which FastReID "
            "crops images to this size: set INPUT.PADDING.ENABLED to False, or the size to "
            "height and width, such as [256, 128]"
        )
