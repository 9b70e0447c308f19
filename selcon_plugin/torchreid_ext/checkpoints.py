"""Files of a torchreid run: names, order and reading of its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from selcon_plugin.runs.checkpoints import (
    BadCheckpointError,
    first_readable,
    newest_first,
    read_checkpoint,
)

_CHECKPOINT = re.compile(r"model\.pth\.tar-(\d+)")


# Entry of a checkpoint beside torchreid's own.
_ENTRY = "selcon"


# Written inside an epoch, when a run is stopped by a signal.
_STOPPED = "model-stopped.pth.tar"


def _checkpoints(folder: Path) -> list[Path]:
    """List a folder's checkpoints by epoch."""
    files = [file for file in folder.glob("*") if _CHECKPOINT.fullmatch(file.name)]
    return sorted(files, key=_epoch_of)


def _epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _model_folder(save_dir: str) -> Path:
    folder = Path(save_dir) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint, or the last one in a run's folder that can be read."""
    required = ("state_dict", "optimizer", "epoch", _ENTRY)
    if path.is_dir():
        folder = path / "model"
        files = _checkpoints(folder)
        files += [file for file in [folder / _STOPPED] if file.is_file()]
        if not files:
            raise FileNotFoundError(f"there is no checkpoint in {folder}")
        return first_readable(newest_first(files), required)
    try:
        return path, read_checkpoint(path, required)
    except BadCheckpointError as error:
        raise BadCheckpointError(
            f"{error}. To begin from its weights, load them with torchreid's "
            "load_pretrained_weights"
        ) from error
