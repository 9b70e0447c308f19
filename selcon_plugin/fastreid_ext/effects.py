"""Report of settings without effect, and of schedules longer than the run."""

from __future__ import annotations

import logging
from typing import Any

from fastreid.config import CfgNode
from torch import nn

from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.recording import changed_keys, disabled_keys, unread_keys
from selcon_plugin.fastreid_ext.config import KEYS, default_values
from selcon_plugin.fastreid_ext.embedding import unwrap
from selcon_plugin.fastreid_ext.freezing import freezes_layers, unmatched_layers

logger = logging.getLogger(__name__)

# Keys that are read before the trainer is built, or at the end of the training.
_READ_ELSEWHERE = (
    *("TEST.", "OUTPUT_DIR", "VERSION", "CUDNN_BENCHMARK", "MODEL.WEIGHTS"),
    *("MODEL.META_ARCHITECTURE", "MODEL.HEADS.NUM_CLASSES", "MODEL.DEVICE"),
    *("SOLVER.CHECKPOINT_PERIOD", "DATASETS.TESTS", "DATASETS.SYNTHETIC_PERSONS."),
)
# FastReID reads these keys in any case.
_OF_OTHER_SCHEDULE = {
    "MultiStepLR": ("SOLVER.ETA_MIN_LR",),
    "CosineAnnealingLR": ("SOLVER.STEPS", "SOLVER.GAMMA"),
}
_OF_WARMUP = ("SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_METHOD")
_OF_FREEZING = ("MODEL.FREEZE_LAYERS", "SOLVER.FREEZE_ITERS")


def keys_without_effect(cfg: CfgNode, model: nn.Module, *, clusters: bool) -> list[str]:
    """List the settings that differ from their defaults and have no effect in a run.

    Args:
        cfg: Config that has recorded which keys the trainer and its parts have read.
        model: Model in training.
        clusters: Whether the method clusters.

    Returns:
        Full keys, and entries of ``MODEL.FREEZE_LAYERS`` that match no parameter.
    """
    defaults = default_values(flatten_config(cfg))
    found = set(unread_keys(cfg, defaults, _READ_ELSEWHERE))
    changed = changed_keys(cfg, defaults)
    found.update(disabled_keys(cfg, changed))
    unused = [*_OF_OTHER_SCHEDULE[cfg.SOLVER.SCHED]]
    if not cfg.SOLVER.WARMUP_ITERS:
        unused += _OF_WARMUP
    if not freezes_layers(cfg):
        unused += _OF_FREEZING
    if not clusters:
        unused += [key for key in changed if key.startswith(f"{KEYS.clustering_path}.")]
    found.update(key for key in unused if key in changed)
    names = [key for key in changed if key in found]
    if freezes_layers(cfg):
        layers = unmatched_layers(model, cfg.MODEL.FREEZE_LAYERS)
        names += [f"MODEL.FREEZE_LAYERS {layer!r}" for layer in layers]
    return names


def report_effects(trainer: Any) -> None:
    """Name the settings without effect in one line; warn of schedules longer than the run.

    Args:
        trainer: The plugin's trainer before its first step, whose config has recorded which
            keys were read.
    """
    cfg, num_steps = trainer.cfg, trainer.max_iter
    clusters = trainer.labeler is not None
    names = keys_without_effect(cfg, unwrap(trainer.model), clusters=clusters)
    if names:
        logger.warning("These settings have no effect in this run: %s", ", ".join(names))
    solver = cfg.SOLVER
    if num_steps <= solver.WARMUP_ITERS:
        logger.warning(
            "SOLVER.WARMUP_ITERS is %d, but the run has %d steps: the learning rate never "
            "reaches SOLVER.BASE_LR. Lower it, or train for more epochs",
            solver.WARMUP_ITERS,
            num_steps,
        )
    if freezes_layers(cfg) and num_steps <= solver.FREEZE_ITERS:
        logger.warning(
            "SOLVER.FREEZE_ITERS is %d, but the run has %d steps: %s is never trained. "
            "Lower it, or train for more epochs",
            solver.FREEZE_ITERS,
            num_steps,
            ", ".join(cfg.MODEL.FREEZE_LAYERS),
        )
    if solver.DELAY_EPOCHS >= solver.MAX_EPOCH:
        logger.warning(
            "SOLVER.DELAY_EPOCHS is %d, but the run has %d epochs: the learning rate stays "
            "constant",
            solver.DELAY_EPOCHS,
            solver.MAX_EPOCH,
        )


def bound_cosine(schedulers: dict[str, Any]) -> None:
    """Give the cosine schedule at least one epoch after a long warm-up or delay.

    FastReID gives it the rest of the run, which may be none; then it divides by zero.

    Args:
        schedulers: FastReID's schedulers by name.
    """
    schedule = schedulers["lr_sched"]
    if hasattr(schedule, "T_max"):
        schedule.T_max = max(1, schedule.T_max)
