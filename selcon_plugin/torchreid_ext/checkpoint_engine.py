"""Checkpoints of a run in torchreid, and the folder that holds them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from selcon_plugin.datasets.content import list_hash
from selcon_plugin.engine.best_weights import BEST_FILE, BestWeights
from selcon_plugin.engine.image_list import images_to_resume_with
from selcon_plugin.engine.run import TrainingRun
from selcon_plugin.models.architecture import RECORD
from selcon_plugin.runs.folder import RunFolder, written_settings
from selcon_plugin.runs.results import RunMeter
from selcon_plugin.runs.settings import flat_settings
from selcon_plugin.runs.state import RunState
from selcon_plugin.torchreid_ext.checkpoints import (
    RUN_ENTRY,
    load_optimizer,
    read_run,
    write_best_weights,
    write_checkpoint,
    write_stopped_checkpoint,
)
from selcon_plugin.torchreid_ext.data import EpochLoader, IndexedReIDImages
from selcon_plugin.torchreid_ext.options import EngineOptions
from selcon_plugin.torchreid_ext.script_engine import ScriptEngine
from selcon_plugin.torchreid_ext.script_settings import host_settings
from selcon_plugin.torchreid_ext.weights import load_whole

logger = logging.getLogger(__name__)


class CheckpointEngine(ScriptEngine):
    """Engine that writes and reads checkpoints with the complete state of a run.

    Args:
        datamanager: Data manager of torchreid.
        use_gpu: Whether to use a GPU, as in torchreid.
        overwrite: Whether a new run may move the files of an earlier one aside.
        config: Config of the run, for ``config.yaml`` and for comparison when the run
            resumes; None for a script, whose arguments are compared.

    Attributes:
        results: See the base class.
    """

    meter: RunMeter
    num_clusters: int | None
    train_loader: EpochLoader
    optimizer: torch.optim.Optimizer
    scheduler: Any
    _training: TrainingRun
    _metadata: RunState
    _best: BestWeights | None
    _engine_options: EngineOptions
    _steps_done: int

    def __init__(
        self, datamanager: Any, use_gpu: bool, *, overwrite: bool, config: Any = None
    ) -> None:
        super().__init__(datamanager, use_gpu)
        self._overwrite, self._config = overwrite, config
        self._folder = RunFolder("")
        self._resumed_in: Path | None = None  # folder of the run that was resumed
        self._to_resume_in: Path | None = None  # folder of a run without a checkpoint

    def _build_run(self, images: IndexedReIDImages) -> TrainingRun:
        raise NotImplementedError

    def _add_teacher(self) -> None:
        raise NotImplementedError

    def _own_folder(self, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Own the folder of the run, and begin or continue the run in it."""
        save_dir = arguments["save_dir"]
        self._folder = RunFolder(save_dir, overwrite=self._overwrite)
        if self._to_resume_in == Path(save_dir).resolve():
            self._folder.resume_from_start()
        resumed = bool(arguments["start_epoch"] or self._steps_done)
        if self._resumed_in is not None:
            # A run that resumes from the checkpoint of another folder is new in this one.
            resumed = self._resumed_in == Path(save_dir).resolve()
        if self._config is not None:
            return self._folder.running(resumed=resumed, config=self._config.dump())
        config = self.script_config(arguments)
        return self._folder.running(resumed=resumed, config=config)

    def _run_state(self, images: IndexedReIDImages, batch_size: int) -> RunState:
        """Return what a resumed run must match."""
        options = self._engine_options.run
        return RunState(
            self._settings(batch_size),
            num_images=len(images),
            # It is taken now: files may disappear before the first checkpoint.
            image_list=images.fingerprint,
            image_content=list_hash(images.hashes),
            seed=options.seed,
            batch_size=batch_size,
            method=options.method,
        )

    def _settings(self, batch_size: int) -> dict[str, Any]:
        if self._config is not None:
            return flat_settings(self._config)
        return {
            **self._engine_options.settings(),
            "train.batch_size": batch_size,
            "model": type(self._network).__name__,
            **host_settings(self.optimizer, self.scheduler, self.datamanager),
        }

    def _save_stopped(self, steps_done: int) -> None:
        checkpoint = self._checkpoint(self.epoch, 0.0, steps_done)
        file = write_stopped_checkpoint(checkpoint, self._save_dir)
        self._folder.mark_last(file.name)
        if self.writer is not None:
            self.writer.close()

    def save_model(
        self, epoch: int, rank1: float, save_dir: str, is_best: bool = False
    ) -> None:
        """Write torchreid's checkpoint with the additional state for resuming the run.

        A file appears under its name only when it is complete.

        Args:
            epoch: Index of the finished epoch, counted from 0.
            rank1: Rank-1 accuracy of its evaluation.
            save_dir: Folder of the run.
            is_best: Whether to save it as ``model-best.pth.tar`` too.
        """
        keep = self._engine_options.run.keep_checkpoints
        self._unsaved = False
        checkpoint = self._checkpoint(epoch + 1, rank1)
        file = write_checkpoint(checkpoint, save_dir, epoch + 1, is_best=is_best, keep=keep)
        self._folder.mark_last(file.name)

    def _save_best(self, epochs: int, best: Mapping[str, Any]) -> None:
        write_best_weights(self.model.state_dict(), self._save_dir, epochs, best)

    def _stateful(self) -> dict[str, Any]:
        """Return the objects with state in addition to torchreid's; None where absent."""
        labeler = self._training.labeler
        return {"meter": self.meter, "labeler": labeler, "best": self._best}

    def _checkpoint(self, epoch: int, rank1: float, steps_done: int = 0) -> dict[str, Any]:
        """Return the complete state of the run after ``epoch`` epochs and some steps."""
        checkpoint = {
            "state_dict": self.model.state_dict(),
            RECORD: self._network.architecture(),
            "epoch": epoch,
            "rank1": float(rank1),
            "optimizer": self.optimizer.state_dict(),
            RUN_ENTRY: {
                "run": self._metadata.state_dict(),
                "num_clusters": self.num_clusters,
                **{
                    name: {} if part is None else part.state_dict()
                    for name, part in self._stateful().items()
                },
                "steps_done": steps_done,
                "unevaluated": self._unevaluated,
            },
        }
        if self.scheduler is not None:
            checkpoint["scheduler"] = self.scheduler.state_dict()
        return checkpoint

    def resume(self, path: str | os.PathLike[str]) -> int:
        """Resume from a checkpoint with weights, optimizer, schedule, banks and labels.

        Args:
            path: Path of a checkpoint, or the ``save_dir`` of a run, whose last readable
                checkpoint is used.

        Returns:
            The epoch to resume with, for ``run(start_epoch=...)``.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If the checkpoint is not from this engine, is unreadable, or belongs
                to a run with other settings, images or another model.
        """  # noqa: DOC502  (raised by the functions called here)
        try:
            file, checkpoint = read_run(Path(path).expanduser())
        except FileNotFoundError:
            self._to_resume_in = Path(path).expanduser().resolve()
            raise
        entry = checkpoint[RUN_ENTRY]
        run_folder = file.parent.parent
        present = self.train_loader.dataset
        images = images_to_resume_with(run_folder, present)
        if images is not present:
            self._training = self._build_run(images)
        then = entry["run"]
        self._metadata.load_state_dict({"settings": written_settings(run_folder), **then})
        load_whole(self._network, checkpoint["state_dict"], file)
        self._add_teacher()
        load_optimizer(self.optimizer, checkpoint["optimizer"], file)
        if self.scheduler is not None and "scheduler" in checkpoint:
            self.scheduler.load_state_dict(checkpoint["scheduler"])
        for name, part in self._stateful().items():
            if part is not None and entry.get(name):
                part.load_state_dict(entry[name])
        if self._best is not None:
            self._best.restore_from(run_folder / "model" / BEST_FILE)
        self.num_clusters = entry["num_clusters"]
        self._resumed_in = run_folder.resolve()
        self.start_epoch = self._epochs_trained = int(checkpoint["epoch"])
        self._steps_done = entry.get("steps_done", 0)
        self._unevaluated = entry.get("unevaluated", False)
        logger.info("Resumed from %s, at epoch %d", file, self.start_epoch + 1)
        return self.start_epoch
