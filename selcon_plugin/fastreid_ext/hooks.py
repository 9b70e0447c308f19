"""Hooks that call the training run, its diagnostics and its files from FastReID's loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastreid.engine.hooks import EvalHook, LRScheduler, PeriodicCheckpointer
from fastreid.engine.train_loop import HookBase

from selcon_plugin.engine.progress import TrainingProgress
from selcon_plugin.engine.run import TrainingRun
from selcon_plugin.fastreid_ext.checkpoint import BEST, FINAL
from selcon_plugin.fastreid_ext.writers import write_metrics


class MethodHook(HookBase):
    """Hook that prepares the method, seeds epochs and steps, and writes the banks.

    Args:
        run: The training run.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def before_train(self) -> None:
        """Initialize the state that no checkpoint has restored."""
        self._run.before_training()

    def before_epoch(self) -> None:
        """Start an epoch."""
        self._run.start_epoch(self.trainer.epoch)

    def before_step(self) -> None:
        """Start a step."""
        self._run.start_step(self.trainer.iter)

    def after_step(self) -> None:
        """Write the banks and update the teacher."""
        self._run.after_step()

    def after_epoch(self) -> None:
        """Check the state after the epoch, and report the spread of the features."""
        measured = self._run.end_epoch(self.trainer.epoch)
        if measured:
            self.trainer.storage.put_scalars(smoothing_hint=False, **measured)
        if self.trainer.epoch + 1 == self.trainer.max_epoch:
            self._run.score_final_epoch(self.trainer.max_epoch)


class DiagnosticsHook(HookBase):
    """Hook that writes diagnostics to FastReID's log, JSON and TensorBoard writers.

    Args:
        run: The training run.
        period: Number of steps between reports; 0 for none.
    """

    def __init__(self, run: TrainingRun, period: int) -> None:
        self._run = run
        self._period = period

    def after_step(self) -> None:
        """Report every ``period`` steps."""
        if not self._period or (self.trainer.iter + 1) % self._period:
            return
        report = self._run.diagnostics()
        if report:
            # Without smoothing: the writers' median over 20 reports would lag by epochs.
            self.trainer.storage.put_scalars(smoothing_hint=False, **report)


class PicturesHook(HookBase):
    """Hook that writes clusters and embedding to TensorBoard after the last epoch.

    Args:
        run: The training run.
        folder: Folder of the run.
    """

    def __init__(self, run: TrainingRun, folder: str) -> None:
        self._run = run
        self._folder = folder

    def after_epoch(self) -> None:
        """Write the pictures if this was the last epoch."""
        if self.trainer.epoch + 1 == self.trainer.max_epoch:
            self._run.write_pictures(self._folder, self.trainer.iter)


class ProgressHook(HookBase):
    """Hook that shows steps, loss, remaining time and memory of each epoch in one line."""

    def before_train(self) -> None:
        """Record the first step of the run."""
        trainer = self.trainer
        self._progress = TrainingProgress(
            trainer.max_epoch, trainer.iters_per_epoch, trainer.start_iter
        )

    def before_step(self) -> None:
        """Open the line of the epoch."""
        self._progress.begin_step(self.trainer.iter)

    def after_step(self) -> None:
        """Update the line."""
        latest = self.trainer.storage.latest()
        loss = latest["total_loss"][0] if "total_loss" in latest else None
        self._progress.end_step(self.trainer.iter, loss)

    def after_train(self) -> None:
        """Close the line of an unfinished epoch."""
        self._progress.close()


class ScheduleHook(LRScheduler):
    """FastReID's hook of the learning rate, without PyTorch's warning in a resumed run."""

    def after_epoch(self) -> None:
        """Advance the schedule by an epoch."""
        with warnings.catch_warnings():
            # An earlier part of the run may have taken all steps of the epoch.
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler")
            super().after_epoch()


class EvaluationHook(EvalHook):
    """FastReID's evaluation hook, with weights that are saved before each evaluation.

    FastReID's own hook evaluates at the end even if an error or a signal ended the last
    epoch.

    Args:
        period: Number of epochs between evaluations.
        evaluate: Evaluates the network and returns its metrics.
        save: Saves the run, because an evaluation may fail or run out of memory.
    """

    def __init__(
        self, period: int, evaluate: Callable[[], Any], save: Callable[[], None]
    ) -> None:
        super().__init__(period, evaluate)
        self._save = save

    def after_epoch(self) -> None:
        """Save and evaluate the epochs whose turn it is."""
        if (self.trainer.epoch + 1) % self._period == 0:
            self._save()
        super().after_epoch()

    def after_train(self) -> None:
        """Evaluate at the end, unless the last epoch was evaluated already."""
        # The hook for checkpoints has saved the last epoch.
        if self.trainer.iter == self.trainer.max_epoch * self.trainer.iters_per_epoch:
            super().after_train()


class CheckpointHook(PeriodicCheckpointer):
    """FastReID's periodic checkpointer, which also supports runs without a test set.

    Args:
        checkpointer: Writer of the files.
        period: Number of epochs between checkpoints.
        keep: Number of periodic checkpoints to keep, the newest ones; 0 for all.
    """

    def __init__(self, checkpointer: Any, period: int, keep: int = 0) -> None:
        super().__init__(checkpointer, period)
        self._keep = keep
        # Otherwise a resumed run would take its next model for the best.
        checkpointer.checkpointables["best"] = self

    def state_dict(self) -> dict[str, float]:
        """Return the metric of the best model so far."""
        return {"metric": float(self.best_metric)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the best metric of a checkpoint, or a better one of the best model."""
        self.best_metric = state["metric"]
        written = self.checkpointer.best_metric
        if written is not None:
            self.best_metric = max(self.best_metric, written)

    def before_train(self) -> None:
        """Record the last epoch, and the metric that selects the best model."""
        if self.trainer.cfg.DATASETS.TESTS:
            super().before_train()
            return
        # FastReID uses the name of the first test set, but here is none.
        self.max_epoch = self.trainer.max_epoch
        self.metric_name = "metric"

    def step(self, epoch: int, **kwargs: Any) -> None:
        """Save the epoch if it is due, after the best model if it is that.

        FastReID's own method saves the last epoch with the metric of an earlier best model.

        Args:
            epoch: Index of the finished epoch, counted from 0.
            **kwargs: Entries of the checkpoint; ``metric`` selects the best model.
        """
        is_last = epoch + 1 >= self.max_epoch
        if not is_last and (epoch + 1) % self.period:
            return
        write_metrics(self.trainer._hooks)
        entries = {"epoch": epoch, **kwargs}
        if entries["metric"] > self.best_metric:
            self.best_metric = entries["metric"]
            self.checkpointer.save(BEST, **entries)
        name = FINAL if is_last else f"model_{epoch:04d}"
        self.checkpointer.save(name, **entries)

    def after_epoch(self) -> None:
        """Save every ``period`` epochs, then delete checkpoints that are too old."""
        super().after_epoch()
        if self._keep:
            folder = Path(self.checkpointer.save_dir)
            # Checkpoints of an earlier, longer run are not touched.
            last = f"model_{self.trainer.epoch:04d}.pth"
            files = [f for f in folder.glob("model_[0-9]*.pth") if f.name <= last]
            for file in sorted(files)[: -self._keep]:
                file.unlink()
