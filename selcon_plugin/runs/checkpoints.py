"""Reading of checkpoints; broken or foreign files are refused with their name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selcon_plugin.io.safe_loading import load_data

logger = logging.getLogger(__name__)


class BadCheckpointError(ValueError):
    """Error for an unreadable checkpoint; the message holds the file and the reason."""


def read_checkpoint(file: str | Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Args:
        file: Checkpoint file.
        required: Names of the entries that the checkpoint must have.

    Returns:
        The entries by name, with tensors on the CPU.

    Raises:
        BadCheckpointError: If the file is empty, truncated or damaged, contains more than
            tensors and plain values, or lacks a required entry.
        FileNotFoundError: If the file does not exist.
    """
    file = Path(file)
    if not file.exists():
        raise FileNotFoundError(f"there is no checkpoint {file}")
    if file.is_file() and file.stat().st_size == 0:
        raise BadCheckpointError(f"{file} is empty, not a checkpoint")
    try:
        content = load_data(file, "cpu")
    except (ValueError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadCheckpointError(
            f"{file} cannot be read as a checkpoint: it is truncated, damaged or another "
            f"kind of file ({reason})"
        ) from error
    entries: dict[str, Any] = content if isinstance(content, dict) else {}
    missing = [key for key in required if key not in entries]
    if missing:
        raise BadCheckpointError(
            f"{file} is not a checkpoint of a run: it has no {', '.join(missing)}"
        )
    return entries


def first_readable(
    files: Sequence[Path], required: Sequence[str]
) -> tuple[Path, dict[str, Any]]:
    """Read the first readable one of several checkpoints and warn about skipped ones.

    Args:
        files: Checkpoint files in order of preference; at least one.
        required: See :func:`read_checkpoint`.

    Returns:
        The file and its entries.

    Raises:
        BadCheckpointError: If no file can be read.
    """
    refused = []
    for file in files:
        try:
            checkpoint = read_checkpoint(file, required)
        except BadCheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            logger.warning("%s. Resuming from %s instead", reason, file)
        return file, checkpoint
    raise BadCheckpointError(
        f"cannot resume: {'; '.join(refused)}. Restore a copy, or remove the file"
        f"{'s' if len(refused) > 1 else ''} to start over"
    )


def newest_first(files: Sequence[Path], last: str = "") -> list[Path]:
    """Sort files by modification time, newest first.

    The order is not by epoch, since a folder may contain files of an earlier, longer run.

    Args:
        files: Existing files.
        last: Name of the file that was recorded as the last one, which comes first; a copy
            of a folder may have other times.

    Returns:
        All files, newest first.
    """
    newest = sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return sorted(newest, key=lambda file: file.name != last)
