"""Unlabeled training data from any image folder, with cameras parsed from the paths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from selcon_plugin.datasets.cameras import (
    FOLDER_CAMERAS,
    NO_CAMERAS,
    Cameras,
    find_cameras,
)
from selcon_plugin.datasets.folder_files import IMAGE_SUFFIXES, TEXT, list_images
from selcon_plugin.io.names import printable

logger = logging.getLogger(__name__)

__all__ = ["IMAGE_SUFFIXES", "NO_CAMERAS", "ImageItem", "list_folder", "read_image_folder"]


class ImageItem(NamedTuple):
    """Image file with its camera.

    Attributes:
        path: Path of the file.
        camera: Name of the camera; None if unknown.
    """

    path: str
    camera: str | None


def read_image_folder(folder: str | Path, *, camera_pattern: str = "") -> list[ImageItem]:
    r"""List the images below a folder, with their cameras.

    Images are known by their suffix (jpg, jpeg, jpe, jfif, png, bmp, dib, gif, tif, tiff,
    and webp, avif where Pillow reads them), other files by their first bytes. Folders that
    are symbolic links are read as well. One warning counts and names all that is left out:
    hidden files, those of other programs and of selcon itself, and files that are not
    images, or not of a type that is read. Broken images are found later, by
    :func:`selcon_plugin.datasets.reading.find_unreadable`, before the training.

    Args:
        folder: Folder searched recursively.
        camera_pattern: Regular expression; its first group, or the whole match without a
            group, is the camera's name; the camera is unknown where the group takes no part
            in the match. With a slash it is searched in the path below ``folder`` (with
            forward slashes), otherwise in the names of the files or in those of the
            folders, whichever match more often. ``"folders"`` uses the first sub-folder.
            ``""`` does so, below folders that hold all images, only if names, file names or
            sizes look like those of cameras and not of persons; a warning tells. ``"none"``
            ignores cameras.

    Returns:
        Images sorted by path.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the folder has no image file, or if the pattern is not a regular
            expression or matches none of the files.
    """  # noqa: DOC502  (raised by the functions called here)
    paths, cameras = list_folder(folder, camera_pattern)
    names = _checked_cameras(cameras, camera_pattern)
    return [ImageItem(path, camera) for path, camera in zip(paths, names, strict=True)]


def list_folder(folder: str | Path, camera_pattern: str) -> tuple[list[str], Cameras]:
    """List the images below a folder, with every camera that is found.

    Args:
        folder: As for :func:`read_image_folder`.
        camera_pattern: As for :func:`read_image_folder`.

    Returns:
        Paths of the images, sorted, and their cameras.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: As for :func:`read_image_folder`.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"image folder {str(folder)!r} does not exist or is not a folder"
        )
    files = list_images(folder)
    if not files.images:
        left_out = files.describe() or files.describe(reasons=[TEXT])
        raise ValueError(
            f"no image files in {str(folder)!r}: supported types are "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            + (f"; left out are {left_out}" if left_out else "")
        )
    if left_out := files.describe():
        logger.warning("%s: left out are %s", printable(folder), left_out)
    elif left_out := files.describe(reasons=[TEXT]):
        logger.info("%s: left out are %s", printable(folder), left_out)
    cameras = find_cameras(files.images, camera_pattern)
    is_known = any(name is not None for name in cameras.names)
    if camera_pattern not in ("", NO_CAMERAS, FOLDER_CAMERAS) and not is_known:
        raise ValueError(
            f"the camera pattern {camera_pattern!r} matches none of the "
            f"{len(files.images)} files, for instance not {files.images[0]!r}; use "
            "--camera-pattern none to ignore cameras"
        )
    if cameras.doubt:
        logger.warning("%s", cameras.doubt)
    return [str(folder / name) for name in files.images], cameras


def _checked_cameras(cameras: Cameras, camera_pattern: str) -> Sequence[str | None]:
    """Drop a camera that all images share, and log the result."""
    found = cameras.names
    names = sorted({name for name in found if name is not None})
    unknown = found.count(None)
    by_pattern = camera_pattern not in ("", NO_CAMERAS, FOLDER_CAMERAS)
    if not names or (len(names) == 1 and not (by_pattern and unknown)):
        logger.info("%d images, cameras unknown: training without camera ids", len(found))
        return [None] * len(found)
    logger.info(
        "%d images from %d cameras (%s%s), %d of unknown camera",
        len(found),
        len(names),
        ", ".join(printable(name) for name in names[:8]),
        ", ..." if len(names) > 8 else "",
        unknown,
    )
    return found
