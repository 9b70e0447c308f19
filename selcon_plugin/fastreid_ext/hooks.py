"""Hooks: when the method is prepared, told, written and watched in the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastreid.engine.hooks import EvalHook, PeriodicCheckpointer
from fastreid.engine.train_loop import HookBase

from selcon_plugin.engine.progress import TrainingProgress
from selcon_plugin.engine.run import TrainingRun


class MethodHook(HookBase):
    """Prepare the method, seed each epoch and step, write the banks after each step.

    Args:
        run: The training run.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def before_train(self) -> None:
        """Prepare what a checkpoint did not bring."""
        self._run.before_training()

    def before_epoch(self) -> None:
        """Begin an epoch."""
        self._run.start_epoch(self.trainer.epoch)

    def before_step(self) -> None:
        """Begin a step."""
        self._run.start_step(self.trainer.iter)

    def after_step(self) -> None:
        """Write the banks and move the teacher."""
        self._run.after_step()

    def after_epoch(self) -> None:
        """Check what the epoch left, and report how far apart the features lie."""
        measured = self._run.end_epoch(self.trainer.epoch)
        if measured:
            self.trainer.storage.put_scalars(smoothing_hint=False, **measured)
        if self.trainer.epoch + 1 == self.trainer.max_epoch:
            self._run.score_final_epoch(self.trainer.max_epoch)


class DiagnosticsHook(HookBase):
    """Write what a user watches to FastReID's log, JSON and TensorBoard writers.

    Args:
        run: The training run.
        period: Steps between reports; 0 for none.
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
            # As measured: the writers' median over 20 reports would lag by epochs.
            self.trainer.storage.put_scalars(smoothing_hint=False, **report)


class PicturesHook(HookBase):
    """Write pictures of clusters and embedding to TensorBoard after the last epoch.

    Args:
        run: The training run.
        folder: Its folder.
    """

    def __init__(self, run: TrainingRun, folder: str) -> None:
        self._run = run
        self._folder = folder

    def after_epoch(self) -> None:
        """Write them, if that was the last."""
        if self.trainer.epoch + 1 == self.trainer.max_epoch:
            self._run.write_pictures(self._folder, self.trainer.iter)


class ProgressHook(HookBase):
    """A line for each epoch of training: steps, loss, time left, memory."""

    def before_train(self) -> None:
        """Note where the run begins."""
        trainer = self.trainer
        self._progress = TrainingProgress(
            trainer.max_epoch, trainer.iters_per_epoch, trainer.start_iter
        )

    def before_step(self) -> None:
        """Open the epoch's line."""
        self._progress.begin_step(self.trainer.iter)

    def after_step(self) -> None:
        """Move it."""
        latest = self.trainer.storage.latest()
        loss = latest["total_loss"][0] if "total_loss" in latest else None
        self._progress.end_step(self.trainer.iter, loss)

    def after_train(self) -> None:
        """Close the line of an epoch that was not finished."""
        self._progress.close()


class EvaluationHook(EvalHook):
    """FastReID's evaluation, of runs that come to their end.

    FastReID's evaluates at the end even where an error or a signal ends the last epoch.
    """

    def after_train(self) -> None:
        """Evaluate at the end, if that was not done after the last epoch."""
        if self.trainer.iter == self.trainer.max_epoch * self.trainer.iters_per_epoch:
            super().after_train()


class CheckpointHook(PeriodicCheckpointer):
    """FastReID's periodic checkpointer, for runs without a test set as well.

    Args:
        checkpointer: Writes the files.
        period: Epochs between checkpoints.
        keep: How many periodic checkpoints stay, the newest; 0 for all.
    """

    def __init__(self, checkpointer: Any, period: int, keep: int = 0) -> None:
        super().__init__(checkpointer, period)
        self._keep = keep
        # Else a resumed run would take its next model for the best.
        checkpointer.checkpointables["best"] = self

    def state_dict(self) -> dict[str, float]:
        """Return the metric of the best model so far."""
        return {"metric": float(self.best_metric)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's best metric."""
        self.best_metric = state["metric"]

    def before_train(self) -> None:
        """Note the last epoch, and the metric that decides which model is the best."""
        if self.trainer.cfg.DATASETS.TESTS:
            super().before_train()
            return
        # FastReID takes the name of the first test set, of which there is none.
        self.max_epoch = self.trainer.max_epoch
        self.metric_name = "metric"

    def after_epoch(self) -> None:
        """Save every ``period`` epochs; then remove what is too old."""
        super().after_epoch()
        if self._keep:
            folder = Path(self.checkpointer.save_dir)
            # What an earlier, longer run left behind is not touched.
            last = f"model_{self.trainer.epoch:04d}.pth"
            files = [f for f in folder.glob("model_[0-9]*.pth") if f.name <= last]
            for file in sorted(files)[: -self._keep]:
                file.unlink()
