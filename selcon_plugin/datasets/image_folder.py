"""Unlabeled training data from any image folder, with cameras parsed from the paths."""

from __future__ import annotations

import logging
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
NO_CAMERAS = "none"
# More sub-folders than this, with fewer images each, are unlikely to be cameras.
_MANY_CAMERAS, _FEW_IMAGES = 20, 100


class ImageItem(NamedTuple):
    """Image file with its camera.

    Attributes:
        path: Path of the file.
        camera: Name of the camera; None if unknown.
    """

    path: str
    camera: str | None


def read_image_folder(folder: str | Path, *, camera_pattern: str = "") -> list[ImageItem]:
    """List the images below a folder, with their cameras.

    No file is opened: :func:`selcon_plugin.datasets.reading.find_unreadable` finds broken
    files before the training.

    Args:
        folder: Folder searched recursively for jpg, jpeg, png, webp and bmp files.
        camera_pattern: Regular expression searched in the path below ``folder`` (with
            forward slashes); its first group, or the whole match without a group, is the
            camera's name. ``""`` uses the first sub-folder if the images lie in two or more
            of them. ``"none"`` ignores cameras.

    Returns:
        Images sorted by path.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the folder has no image file, or if the pattern is not a regular
            expression or matches none of the files.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"image folder {str(folder)!r} does not exist or is not a folder"
        )
    find_camera = camera_finder(camera_pattern)
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
    )
    if not paths:
        raise ValueError(
            f"no image files in {str(folder)!r}: supported types are "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    cameras = [find_camera(path.relative_to(folder)) for path in paths]
    cameras = _checked_cameras(cameras, camera_pattern, paths)
    return [
        ImageItem(str(path), camera) for path, camera in zip(paths, cameras, strict=True)
    ]


class CameraFinder:
    """Function that finds the camera in a path relative to the image folder."""

    def __init__(self, pattern: re.Pattern[str] | None, use_folder: bool) -> None:
        self._pattern = pattern
        self._use_folder = use_folder

    def __call__(self, path: Path) -> str | None:
        """Return the camera's name; None if unknown."""
        if self._pattern is not None:
            match = self._pattern.search(path.as_posix())
            if match is None:
                return None
            return str(match.group(1) if self._pattern.groups else match.group())
        if self._use_folder and len(path.parts) > 1:
            return path.parts[0]
        return None


def camera_finder(camera_pattern: str) -> CameraFinder:
    """Create a function that finds cameras in paths.

    Args:
        camera_pattern: See :func:`read_image_folder`.

    Returns:
        Function from a path below the folder to the camera's name.

    Raises:
        ValueError: If the pattern is not a regular expression.
    """
    if camera_pattern == NO_CAMERAS:
        return CameraFinder(None, use_folder=False)
    if not camera_pattern:
        return CameraFinder(None, use_folder=True)
    try:
        return CameraFinder(re.compile(camera_pattern), use_folder=False)
    except re.error as error:
        raise ValueError(
            f"the camera pattern {camera_pattern!r} is not a regular expression: {error}"
        ) from error


def _checked_cameras(
    cameras: list[str | None], camera_pattern: str, paths: list[Path]
) -> list[str | None]:
    """Drop cameras if there are fewer than two, and log the result."""
    names = sorted({camera for camera in cameras if camera is not None})
    if camera_pattern not in ("", NO_CAMERAS) and not names:
        raise ValueError(
            f"the camera pattern {camera_pattern!r} matches none of the {len(paths)} "
            f"files, for instance not {str(paths[0])!r}; use --camera-pattern none to "
            "train without cameras"
        )
    if len(names) < 2:
        logger.info("%d images, cameras unknown: training without camera ids", len(cameras))
        return [None] * len(cameras)
    unknown = cameras.count(None)
    logger.info(
        "%d images from %d cameras (%s%s), %d of unknown camera",
        len(cameras),
        len(names),
        ", ".join(names[:8]),
        ", ..." if len(names) > 8 else "",
        unknown,
    )
    usual = statistics.median(Counter(filter(None, cameras)).values())
    if not camera_pattern and len(names) > _MANY_CAMERAS and usual < _FEW_IMAGES:
        logger.warning(
            "%d sub-folders with a median of %g images are used as cameras. If they are "
            "persons or tracks, ignore them by --camera-pattern none",
            len(names),
            usual,
        )
    return cameras
