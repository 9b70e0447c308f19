"""A folder of links for each cluster of ``selcon cluster``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from selcon_plugin.clustering import OUTLIER
from selcon_plugin.io.atomic import make_folder, write_atomically
from selcon_plugin.io.names import printable
from selcon_plugin.io.own_output import MARKER, mark_output
from selcon_plugin.workflows.folder_clusters import FolderClusters

__all__ = ["link_clusters"]

_OUTLIERS = "outliers"
_LONGEST_NAME = 255  # bytes, on all usual file systems
# Records the links of the last call, which are the only files that a later one removes.
_RECORD = ".selcon_links.json"


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
    _remove_links(folder)
    make_folder(folder)
    mark_output(folder)
    sources = _sources(clusters)
    # Written first: a kill leaves no link that a later call would not know.
    write_atomically(
        json.dumps({name: str(sources[name]) for name in sources}), folder / _RECORD
    )
    for name, source in sources.items():
        link = folder / name
        link.parent.mkdir(exist_ok=True)
        try:
            link.symlink_to(_target(link, source))
        except (OSError, ValueError):  # ValueError: another drive of Windows
            os.link(source, link)


def _sources(clusters: FolderClusters) -> dict[str, Path]:
    """Return the image that each link leads to, by the link's name in the folder."""
    sources = {}
    for cluster in range(OUTLIER, clusters.num_clusters):
        place = _OUTLIERS if cluster == OUTLIER else f"{cluster:04d}"
        for number, image in enumerate(clusters.members(cluster)):
            source = Path(clusters.paths[image]).absolute()
            # Images of several folders may have the same name.
            name = _link_name(f"{number:04d}_", source.name)
            sources[f"{place}/{name}"] = source
    return sources


def _target(link: Path, source: Path) -> str:
    # The folder itself may be reached by a symbolic link, which ".." would not go back.
    return os.path.relpath(source, os.path.realpath(link.parent))


def _link_name(number: str, name: str) -> str:
    """Shorten a name that would be too long with its number, but keep the suffix."""
    whole = os.fsencode(number + name)
    if len(whole) <= _LONGEST_NAME:
        return number + name
    suffix = os.fsencode(os.path.splitext(name)[1])
    kept = whole[: max(0, _LONGEST_NAME - len(suffix))]
    return kept.decode(errors="ignore") + os.fsdecode(suffix)


def _remove_links(folder: Path) -> None:
    """Remove the links of an earlier call; refuse to remove anything else."""
    if folder.is_symlink() or folder.is_file():
        raise ValueError(_refusal(folder, folder))
    if not folder.exists():
        return
    made = _recorded(folder)
    for file in _files_below(folder):
        name = file.relative_to(folder).as_posix()
        if name not in (MARKER, _RECORD) and not _is_ours(file, made.get(name)):
            raise ValueError(_refusal(folder, file))
    shutil.rmtree(folder)


def _recorded(folder: Path) -> dict[str, str]:
    """Return the image of each link that the last call has made, by the link's name."""
    try:
        made = json.loads((folder / _RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def _is_ours(file: Path, source: str | None) -> bool:
    """Return whether a file is the link that was made of an image."""
    if source is None:
        return False
    if file.is_symlink():
        return os.readlink(file) == _target(file, Path(source))
    # The only name that a file has left must stay.
    return _identity(file) == _identity(source)


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
