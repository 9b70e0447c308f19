"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_atomically(data: Any, file: str | Path) -> None:
    """Save as ``torch.save`` does; a kill at any moment leaves an earlier file intact.

    Args:
        data: What to save.
        file: The file to write or replace.
    """
    partial = f"{file}.partial"
    with open(partial, "wb") as stream:
        torch.save(data, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
