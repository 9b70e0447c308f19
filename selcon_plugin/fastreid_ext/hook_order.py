"""Order of the plugin's hooks among FastReID's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastreid.engine import hooks as host_hooks
from fastreid.engine.train_loop import HookBase

from selcon_plugin.fastreid_ext.clustering_hook import ClusteringHook
from selcon_plugin.fastreid_ext.freezing import FreezeHook
from selcon_plugin.fastreid_ext.hooks import (
    CheckpointHook,
    DiagnosticsHook,
    EvaluationHook,
    MethodHook,
    PicturesHook,
    ProgressHook,
    ScheduleHook,
)


def arrange_hooks(
    trainer: Any, hosts: Sequence[HookBase], *, show_progress: bool
) -> list[HookBase]:
    """Add the method's hooks to FastReID's, and replace those that do not fit.

    Args:
        trainer: The plugin's trainer, after it is set up.
        hosts: FastReID's hooks.
        show_progress: Whether to show each epoch's progress.

    Returns:
        Hooks in the order in which they run. Those of the method come first, so that a
        step's banks are written before anything is evaluated or saved.
    """
    cfg, run = trainer.cfg, trainer.training_run
    result: list[HookBase] = [MethodHook(run)]
    if trainer.labeler is not None:
        result.append(ClusteringHook(run))
    if cfg.MODEL.SELCON.TENSORBOARD_PICTURES:
        result.append(PicturesHook(run, cfg.OUTPUT_DIR))
    if show_progress:
        # It follows the clustering, which is a stage of its own, and precedes the
        # evaluation.
        result.append(ProgressHook())
    result.append(DiagnosticsHook(run, cfg.MODEL.SELCON.DIAGNOSTICS_PERIOD))
    for hook in hosts:
        replaced = _replacement(trainer, hook)
        if replaced is not None:
            result.append(replaced)
    return result


def _replacement(trainer: Any, hook: HookBase) -> HookBase | None:
    """Return the hook to use in place of one of FastReID's, or None for no hook."""
    cfg = trainer.cfg
    if isinstance(hook, host_hooks.IterationTimer):
        # FastReID ignores the first three steps and then fails to print the time of an
        # epoch without further steps.
        return host_hooks.IterationTimer(warmup_iter=1)
    if isinstance(hook, host_hooks.PeriodicCheckpointer):
        period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.MODEL.SELCON.KEEP_CHECKPOINTS
        return CheckpointHook(trainer.checkpointer, period, keep)
    if isinstance(hook, host_hooks.LRScheduler):
        return ScheduleHook(trainer.optimizer, trainer.scheduler)
    if isinstance(hook, host_hooks.LayerFreeze):
        return FreezeHook(hook.model, hook.freeze_layers, hook.freeze_iters)
    if isinstance(hook, host_hooks.EvalHook):
        if not cfg.DATASETS.TESTS:
            return None
        # Period 0 means only at the end; FastReID's hook would divide by it.
        period = cfg.TEST.EVAL_PERIOD or cfg.SOLVER.MAX_EPOCH
        evaluate = trainer.meter.excluding(hook._func)
        return EvaluationHook(period, evaluate, trainer.save_before_evaluation)
    return hook
