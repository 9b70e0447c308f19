"""Recognize output of this package in a folder of images, where it is no input.

A folder that the package creates as a whole, such as the links of ``selcon cluster``, holds
a marker. Single files and folders beside the images of a user are known by the file next to
which they are written: a contact sheet, for instance, lies beside ``clusters.csv``.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

MARKER = ".selcon_output"
# Comment in the contact sheets, which are known by it wherever they are moved.
SHEET_MARK = b"selcon contact sheet"
_MARKER_TEXT = "Written by selcon; not an input. It may be removed with this folder.\n"
# What lies beside a file of the package, by the name of that file.
_BESIDE = {
    "clusters.csv": ("contact_sheet.jpg", "links"),
    "results.json": ("ranked.png", "loss.png"),
}
_TABLE_HEAD = b"image,cluster,confidence,camera"


def mark_output(folder: str | Path) -> None:
    """Mark a folder that holds only output.

    Args:
        folder: Existing folder.
    """
    Path(folder, MARKER).write_text(_MARKER_TEXT, encoding="utf-8")


def is_output(folder: str | Path) -> bool:
    """Return whether :func:`mark_output` has marked a folder.

    Args:
        folder: Any folder.
    """
    return Path(folder, MARKER).is_file()


def own_entries(folder: str, names: Collection[str]) -> set[str]:
    """Return which files and folders of a folder the package has written.

    Args:
        folder: The folder.
        names: Names of all its files and folders.

    Returns:
        Names of those that are output. A file of a user is never among them, even if a
        user's folder of images was given as the folder of an output.
    """
    own: set[str] = set()
    for file, beside in _BESIDE.items():
        if file in names and _is_ours(os.path.join(folder, file)):
            own.update(name for name in beside if name in names)
    return own


def _is_ours(file: str) -> bool:
    if not file.endswith("clusters.csv"):
        return True
    try:
        with open(file, "rb") as stream:
            return stream.read(len(_TABLE_HEAD)) == _TABLE_HEAD
    except OSError:
        return False
