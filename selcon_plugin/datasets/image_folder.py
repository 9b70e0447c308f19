"""Any folder of images as training data: no identities, cameras if the paths tell them."""

from __future__ import annotations

import logging
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
NO_CAMERAS = "none"
_LISTED_BROKEN_FILES = 10
_READERS = 4


class ImageItem(NamedTuple):
    """One image file.

    Attributes:
        path: Path of the file.
        camera: Name of its camera; None where unknown.
    """

    path: str
    camera: str | None


def read_image_folder(folder: str | Path, *, camera_pattern: str = "") -> list[ImageItem]:
    """List the readable images below a folder, with their cameras.

    Every file is decoded once, so that a broken one is met here and not in the middle of
    the training: broken and zero-byte files are left out and named in one warning.

    Args:
        folder: Searched to any depth for jpg, jpeg, png, webp and bmp files.
        camera_pattern: Regular expression searched in the path below ``folder`` (with
            forward slashes); its first group, or the whole match without a group, names the
            camera. ``""`` takes the first sub-folder if the images lie in two or more of
            them. ``"none"`` leaves cameras out.

    Returns:
        Images sorted by path.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds no readable image, or if the pattern is no regular
            expression or fits none of the files.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"image folder {str(folder)!r} does not exist or is no folder"
        )
    find_camera = _camera_finder(camera_pattern)
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    readable = _without_broken(paths)
    if not readable:
        found = f"all {len(paths)} image files are broken" if paths else "no image files"
        raise ValueError(
            f"{found} in {str(folder)!r}: it needs files of type "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    cameras = [find_camera(path.relative_to(folder)) for path in readable]
    cameras = _checked_cameras(cameras, camera_pattern, readable)
    return [
        ImageItem(str(path), camera) for path, camera in zip(readable, cameras, strict=True)
    ]


class _CameraFinder:
    """Find the camera in a path relative to the image folder."""

    def __init__(self, pattern: re.Pattern[str] | None, use_folder: bool) -> None:
        self._pattern = pattern
        self._use_folder = use_folder

    def __call__(self, path: Path) -> str | None:
        if self._pattern is not None:
            match = self._pattern.search(path.as_posix())
            if match is None:
                return None
            return str(match.group(1) if self._pattern.groups else match.group())
        if self._use_folder and len(path.parts) > 1:
            return path.parts[0]
        return None


def _camera_finder(camera_pattern: str) -> _CameraFinder:
    if camera_pattern == NO_CAMERAS:
        return _CameraFinder(None, use_folder=False)
    if not camera_pattern:
        return _CameraFinder(None, use_folder=True)
    try:
        return _CameraFinder(re.compile(camera_pattern), use_folder=False)
    except re.error as error:
        raise ValueError(
            f"the camera pattern {camera_pattern!r} is no regular expression: {error}"
        ) from error


def _checked_cameras(
    cameras: list[str | None], camera_pattern: str, paths: list[Path]
) -> list[str | None]:
    """Drop cameras that tell nothing; say in the log what was found."""
    names = sorted({camera for camera in cameras if camera is not None})
    if camera_pattern not in ("", NO_CAMERAS) and not names:
        raise ValueError(
            f"the camera pattern {camera_pattern!r} fits none of the {len(paths)} files, "
            f"for instance not {str(paths[0])!r}; --camera-pattern none trains without "
            "cameras"
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
    return cameras


def _without_broken(paths: list[Path]) -> list[Path]:
    """Decode every file; return the good ones and warn once about the others."""
    with ThreadPoolExecutor(
        _READERS
    ) as pool:  # Pillow decodes outside the interpreter lock
        progress = tqdm(
            pool.map(_fault_of, paths),
            total=len(paths),
            desc="checking images",
            unit="img",
            leave=False,
            disable=None,
        )
        faults = list(progress)
    broken = [(path, fault) for path, fault in zip(paths, faults, strict=True) if fault]
    if broken:
        listed = "\n".join(
            f"  {path}: {fault}" for path, fault in broken[:_LISTED_BROKEN_FILES]
        )
        more = len(broken) - _LISTED_BROKEN_FILES
        logger.warning(
            "%d of %d image files cannot be read and are left out:\n%s%s",
            len(broken),
            len(paths),
            listed,
            f"\n  ... and {more} more" if more > 0 else "",
        )
    return [path for path, fault in zip(paths, faults, strict=True) if not fault]


def _fault_of(path: Path) -> str:
    """Return why a file cannot be decoded, or ``""``."""
    try:
        if not path.stat().st_size:
            return "empty file"
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # oddities of metadata do not matter here
            image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
