"""Check that output can be written, and replaces neither an input nor another's file."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

PAGES = (".html", ".htm")  # suffixes of pages


def check_output_file(
    file: str | Path,
    *,
    name: str,
    kinds: tuple[str, ...],
    inputs: Iterable[str | Path] = (),
) -> None:
    """Refuse a file for output that cannot be written, or would replace something else.

    An earlier output of the same kind is replaced, but not a photo or a checkpoint, which
    may be the only one.

    Args:
        file: File to write.
        name: Name of the option or argument, for the error message.
        kinds: Suffixes of the files that may be replaced, with their dot and in lower case.
            A file without a suffix may be replaced as well.
        inputs: Files that are read; an empty text is none.

    Raises:
        ValueError: If the name is empty, the file is a folder or a device, one of the
            inputs, or an existing file with another suffix, or if its folder can neither be
            written nor created.
    """
    path = Path(file)
    if not os.fspath(file):
        raise ValueError(f"{name} is empty: give the name of a file")
    try:
        mode = path.stat().st_mode
    except OSError:
        mode = 0  # it does not exist, or its folder tells what is wrong
    if stat.S_ISDIR(mode):
        raise ValueError(f"{name} {file} is a folder: give the name of a file in it")
    if mode and not stat.S_ISREG(mode):
        raise ValueError(f"{name} {file} is a device or a pipe: give the name of a file")
    for other in inputs:
        if _is_same(path, other):
            raise ValueError(f"{name} {file} is a file that is read: choose another name")
    if mode and path.suffix and path.suffix.lower() not in kinds:
        raise ValueError(
            f"{name} {file} exists and is not a {kinds[0]} file: choose another name, or "
            "move that file"
        )
    reason = _reason_not_writable(path.parent)
    if reason:
        raise ValueError(
            f"{name} {file}: {str(path.parent)!r} is not a writable folder: {reason}. "
            "Choose another place"
        )


def check_output_folder(key: str, folder: str) -> str:
    """Check that a folder is writable, or can be created; nothing changes on the disk.

    Args:
        key: Name of the option, argument or config key, for the error message.
        folder: Path of the folder.

    Returns:
        The path.

    Raises:
        ValueError: If the name is empty, or the folder cannot be created or is not
            writable.
    """
    if not folder:
        raise ValueError(f"{key} is empty: give the name of a folder")
    reason = _reason_not_writable(Path(folder))
    if reason:
        raise ValueError(
            f"{key} {folder!r} is not a writable folder: {reason}. Use another one"
        )
    return folder


def _reason_not_writable(place: Path) -> str:
    """Return why a folder, or the one to create it in, cannot be written; "" if it can."""
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return error.strerror or str(error)


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
