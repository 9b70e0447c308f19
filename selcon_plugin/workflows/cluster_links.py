"""A folder of links for each cluster of ``selcon cluster``."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from selcon_plugin.clustering import OUTLIER
from selcon_plugin.io.names import printable
from selcon_plugin.io.own_output import MARKER, mark_output
from selcon_plugin.workflows.folder_clusters import FolderClusters

__all__ = ["link_clusters"]

_OUTLIERS = "outliers"
_LONGEST_NAME = 255  # bytes, on all usual file systems
_FOLDER = re.compile(rf"\d{{4,}}|{_OUTLIERS}")
_LINK = re.compile(r"\d{4,}_.")


def link_clusters(clusters: FolderClusters, folder: str | Path) -> None:
    """Create a folder of links for each cluster, the most confident image first.

    The links are relative symbolic links, or hard links if the file system has no
    symbolic ones.

    Args:
        clusters: The clusters to link.
        folder: Folder to create, or to replace if it contains only the links of an earlier
            call; its subfolders are ``0000``, ``0001``, ... and ``outliers``.

    Raises:
        ValueError: If the folder contains anything else, which is not removed.
    """  # noqa: DOC502  (raised by the functions called here)
    folder = Path(folder)
    _remove_links(folder, clusters)
    folder.mkdir(parents=True)
    mark_output(folder)
    for cluster in range(OUTLIER, clusters.num_clusters):
        members = clusters.members(cluster)
        if not len(members):
            continue
        place = folder / (_OUTLIERS if cluster == OUTLIER else f"{cluster:04d}")
        place.mkdir()
        for number, image in enumerate(members):
            source = Path(clusters.paths[image]).absolute()
            # Images of several folders may have the same name.
            link = place / _link_name(f"{number:04d}_", source.name)
            try:
                link.symlink_to(os.path.relpath(source, place.absolute()))
            except (OSError, ValueError):  # ValueError: another drive of Windows
                os.link(source, link)


def _link_name(number: str, name: str) -> str:
    """Shorten a name that would be too long with its number, but keep the suffix."""
    whole = os.fsencode(number + name)
    if len(whole) <= _LONGEST_NAME:
        return number + name
    suffix = os.fsencode(os.path.splitext(name)[1])
    kept = whole[: max(0, _LONGEST_NAME - len(suffix))]
    return kept.decode(errors="ignore") + os.fsdecode(suffix)


def _remove_links(folder: Path, clusters: FolderClusters) -> None:
    """Remove the links of an earlier call; refuse to remove anything else."""
    if folder.is_symlink():
        raise ValueError(_refusal(folder, folder))
    if not folder.exists():
        return
    images = {_identity(path) for path in clusters.paths} - {None}
    for file in _files_below(folder):
        is_ours = (
            file.parent.parent == folder
            and _FOLDER.fullmatch(file.parent.name)
            and _LINK.match(file.name)
            # The only name of a file must stay, as a hard link of a user must.
            and (file.is_symlink() or _identity(file) in images)
        )
        if not is_ours and file != folder / MARKER:
            raise ValueError(_refusal(folder, file))
    shutil.rmtree(folder)


def _files_below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        for name in (*names, *(name for name in folders if Path(place, name).is_symlink())):
            yield Path(place, name)


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refusal(folder: Path, file: Path) -> str:
    return (
        f"{printable(folder)} would be replaced by links, but contains {printable(file)}, "
        "which is not one of them: move it, or give another --output"
    )
