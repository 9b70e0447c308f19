"""Checkpoints read back: what is broken or foreign is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selcon_plugin.io.safe_loading import load_data

logger = logging.getLogger(__name__)


class BadCheckpointError(ValueError):
    """A file is no checkpoint that can be read; the message names it and says why."""


def read_checkpoint(file: str | Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint, without running code from it.

    Args:
        file: The file.
        required: Entries without which it is not a checkpoint of the kind wanted.

    Returns:
        Its entries by name, tensors on the CPU.

    Raises:
        BadCheckpointError: If it is empty, cut off, damaged, holds more than tensors and
            plain values, or lacks an entry.
        FileNotFoundError: If there is none.
    """
    file = Path(file)
    if not file.exists():
        raise FileNotFoundError(f"there is no checkpoint {file}")
    if file.is_file() and file.stat().st_size == 0:
        raise BadCheckpointError(f"{file} is empty: no checkpoint")
    try:
        content = load_data(file, "cpu")
    except (ValueError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadCheckpointError(
            f"{file} cannot be read as a checkpoint: it is cut off, damaged or something "
            f"else ({reason})"
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
    """Read the first of several checkpoints that can be read; warn of those passed over.

    Args:
        files: The best first; at least one.
        required: As for :func:`read_checkpoint`.

    Returns:
        The file and its entries.

    Raises:
        BadCheckpointError: If none can be read.
    """
    refused = []
    for file in files:
        try:
            checkpoint = read_checkpoint(file, required)
        except BadCheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            logger.warning("%s. Going on from %s in its place", reason, file)
        return file, checkpoint
    raise BadCheckpointError(
        f"cannot resume: {'; '.join(refused)}. Put back a copy, or remove the file"
        f"{'s' if len(refused) > 1 else ''} and begin anew"
    )


def newest_first(files: Sequence[Path]) -> list[Path]:
    """Order files by when they were written, the last one first.

    Args:
        files: Existing files.

    Returns:
        All of them. Not by their epoch: a folder may hold what an earlier, longer run left.
    """
    return sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)
