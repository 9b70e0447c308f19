"""Writing, listing and reading of the checkpoints of a torchreid run."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from selcon_plugin.engine.best_weights import BEST_FILE
from selcon_plugin.io.atomic import make_folder, save_atomically
from selcon_plugin.models.architecture import RECORD, recorded_architecture
from selcon_plugin.models.state_keys import without_method
from selcon_plugin.runs.checkpoints import (
    BadCheckpointError,
    first_readable,
    newest_first,
    read_checkpoint,
)
from selcon_plugin.runs.folder import RunFolder

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"model\.pth\.tar-(\d+)")

# Entry of a checkpoint in addition to torchreid's own.
RUN_ENTRY = "selcon"

# Checkpoint inside an epoch, written when a signal stops the run.
_STOPPED = "model-stopped.pth.tar"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, sorted by epoch."""
    files = [file for file in folder.glob("*") if _CHECKPOINT.fullmatch(file.name)]
    return sorted(files, key=checkpoint_epoch)


def checkpoint_epoch(checkpoint: Path) -> int:
    """Return the number of epochs in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def write_checkpoint(
    checkpoint: dict[str, Any], save_dir: str, epochs: int, *, is_best: bool, keep: int
) -> Path:
    """Write the checkpoint after an epoch, and delete those that are too old.

    A file appears under its name only when it is complete.

    Args:
        checkpoint: Complete state of the run.
        save_dir: Folder of the run.
        epochs: Number of finished epochs.
        is_best: Whether to write it as ``model-best.pth.tar`` too.
        keep: Number of checkpoints to keep, the newest ones; 0 for all.

    Returns:
        The checkpoint.
    """
    folder = _model_folder(save_dir)
    file = folder / f"model.pth.tar-{epochs}"
    save_atomically(checkpoint, file)
    logger.info("Checkpoint saved to %s", file)
    (folder / _STOPPED).unlink(missing_ok=True)  # the stopped checkpoint is outdated
    if is_best:
        save_atomically(checkpoint, folder / "model-best.pth.tar")
    if keep:
        # Checkpoints of an earlier, longer run are not touched.
        own = [old for old in list_checkpoints(folder) if checkpoint_epoch(old) <= epochs]
        for old in own[:-keep]:
            old.unlink()
    return file


def write_stopped_checkpoint(checkpoint: dict[str, Any], save_dir: str) -> Path:
    """Write the checkpoint of a run that a signal stops inside an epoch.

    Args:
        checkpoint: Complete state of the run.
        save_dir: Folder of the run.

    Returns:
        The checkpoint.
    """
    file = _model_folder(save_dir) / _STOPPED
    save_atomically(checkpoint, file)
    return file


def write_best_weights(
    state: Mapping[str, Any], save_dir: str, epochs: int, best: Mapping[str, Any]
) -> None:
    """Write the best weights by a label-free criterion; no run resumes from them.

    Args:
        state: State of the model.
        save_dir: Folder of the run.
        epochs: Number of epochs that the weights were trained for.
        best: The value that makes them the best.
    """
    kept = without_method(state)
    weights = {
        "state_dict": kept,
        "epoch": epochs,
        "best": dict(best),
        RECORD: recorded_architecture(kept),
    }
    save_atomically(weights, _model_folder(save_dir) / BEST_FILE)


def _model_folder(save_dir: str) -> Path:
    return make_folder(Path(save_dir) / "model")


def read_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint, or the last readable one in the folder of a run.

    Args:
        path: Path of a checkpoint, or folder of a run.

    Returns:
        The file and its content.

    Raises:
        BadCheckpointError: If the file is not a checkpoint of this engine.
        FileNotFoundError: If there is no checkpoint.
    """
    required = ("state_dict", "optimizer", "epoch", RUN_ENTRY)
    if path.is_dir():
        run, folder = RunFolder(path), path / "model"
        files = list_checkpoints(folder)
        files += [file for file in [folder / _STOPPED] if file.is_file()]
        if not files or not run.has_begun:
            raise FileNotFoundError(f"there is no checkpoint in {folder}")
        return first_readable(newest_first(files, run.last), required)
    try:
        return path, read_checkpoint(path, required)
    except BadCheckpointError as error:
        raise BadCheckpointError(
            f"{error}. To start from its weights, load them with torchreid's "
            "load_pretrained_weights"
        ) from error


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], file: Path
) -> None:
    """Load the state of an optimizer.

    Args:
        optimizer: Optimizer to load into.
        state: State of the checkpoint.
        file: Checkpoint, for the error message.

    Raises:
        ValueError: If it is the state of an optimizer with other groups of weights.
    """
    try:
        optimizer.load_state_dict(dict(state))
    except ValueError as error:
        raise ValueError(
            f"{file} was trained with an optimizer of other weights or groups of weights "
            f"({error}): resume it as it was trained, by the same script, or with the same "
            "train.staged_lr and train.new_layers"
        ) from error
