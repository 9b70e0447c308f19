"""Check that output replaces neither an input nor a file of another kind."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path


def check_output_file(
    file: str | Path,
    *,
    name: str,
    kinds: tuple[str, ...],
    inputs: Iterable[str | Path] = (),
) -> None:
    """Refuse a file for output whose writing would lose something else.

    An earlier output of the same kind is replaced, but not a photo or a checkpoint, which
    may be the only one.

    Args:
        file: File to write.
        name: Name of the option or argument, for the error message.
        kinds: Suffixes of the files that may be replaced, with their dot and in lower case.
            A file without a suffix may be replaced as well.
        inputs: Files that are read; an empty text is none.

    Raises:
        ValueError: If the file is a folder or a device, one of the inputs, or an existing
            file with another suffix.
    """
    path = Path(file)
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # it does not exist, or writing it tells what is wrong
    if stat.S_ISDIR(mode):
        raise ValueError(f"{name} {file} is a folder: give the name of a file in it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} {file} is a device or a pipe: give the name of a file")
    for other in inputs:
        if _is_same(path, other):
            raise ValueError(f"{name} {file} is a file that is read: choose another name")
    if path.suffix and path.suffix.lower() not in kinds:
        raise ValueError(
            f"{name} {file} exists and is not a {kinds[0]} file: choose another name, or "
            "move that file"
        )


def check_output_apart(folder: str | Path, file: str | Path, *, name: str) -> None:
    """Refuse a folder for output that holds the network that is read, with its config.

    Args:
        folder: Folder to write a network and its ``config.yaml`` to.
        file: The checkpoint that is read.
        name: Name of the option or argument, for the error message.

    Raises:
        ValueError: If the checkpoint lies in the folder, whose config would be replaced.
    """
    if _is_same(folder, Path(file).expanduser().parent):
        raise ValueError(
            f"{name} {folder} is the folder of {file}, and its config.yaml would be "
            "replaced: choose another folder"
        )


def _is_same(one: str | Path, other: str | Path) -> bool:
    try:
        return bool(str(other)) and os.path.samefile(one, Path(other).expanduser())
    except OSError:
        return False
