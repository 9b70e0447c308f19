"""Image reader for both hosts, and a parallel check of many image files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from selcon_plugin.io.atomic import write_atomically

logger = logging.getLogger(__name__)

# Pillow's default limit for a warning: 256 MiB in RGB. A larger image would exhaust the
# memory of every process that reads it, and cannot be a person crop.
MAX_PIXELS = 89_478_485

# Faults of the machine, not of the file: no other image could be read either.
_RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_READERS = 8
# Checking fewer files takes less than a second and is not worth a cache file.
_MIN_CACHED_FILES = 1000


class ImageReadError(OSError):
    """Error for an unusable image file; the message holds the path and the reason."""


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read any image file as 8-bit RGB.

    The image is rotated according to its EXIF data. Gray, palette and CMYK images are
    converted, 16-bit gray values keep their upper 8 bits, transparency is composited onto
    black, and only the first frame of an animation is read. Unusable files are refused:
    truncated or empty files, files of another type whatever their name, folders and pipes,
    floating-point images, and images of more than :data:`MAX_PIXELS`.

    Args:
        path: Path of the image file.

    Returns:
        The image.

    Raises:
        ImageReadError: If the file cannot be used; the message holds path and reason.
        MemoryError: If the machine is out of memory.
        OSError: If the machine is out of memory or file handles.
    """
    try:
        return _read(path)
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in _RESOURCE_ERRORS:
            raise
        raise ImageReadError(f"{os.fspath(path)}: {_reason(error)}") from error
    except Exception as error:
        # Pillow's decoders raise almost anything on a damaged file: SyntaxError, EOFError,
        # struct.error, IndexError, DecompressionBombError, ...
        raise ImageReadError(f"{os.fspath(path)}: {_reason(error)}") from error


def _read(path: str | os.PathLike[str]) -> Image.Image:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise ValueError("not a file")
    if not status.st_size:
        raise ValueError("empty file")
    with Image.open(path) as image:
        return _as_rgb(image)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which is already in the message
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or of an unknown format"
    return str(error) or type(error).__name__


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
        )
    image.load()
    with contextlib.suppress(Exception):  # with damaged EXIF data the pixels are usable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white")
    if image.mode.startswith("I"):
        # Pillow would clip the values at 255, which gives a white image.
        pixels = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image.convert("RGB")


def fault_of(path: str | os.PathLike[str]) -> str:
    """Return why a file cannot be used as an image.

    Args:
        path: Path of the image file.

    Returns:
        Path and reason; ``""`` for a usable file.
    """
    try:
        read_rgb(path)
    except ImageReadError as error:
        return str(error)
    return ""


def find_unreadable(paths: Sequence[str], *, progress: bool = True) -> dict[str, str]:
    """Find unreadable image files by decoding all files in parallel.

    For 1,000 files or more the result is cached in ``$XDG_CACHE_HOME/selcon_plugin`` or
    ``~/.cache/selcon_plugin``: as long as names, sizes and modification times are the same,
    only the unreadable files are checked again.

    Args:
        paths: Paths of the image files.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        Path and reason by path for the unreadable files, in the given order.
    """
    cache_file = None
    suspects = paths
    if len(paths) >= _MIN_CACHED_FILES:
        cache_file = _cache_file(paths)
        suspects = _read_cache(cache_file, paths)
    # Set here instead of in each thread: warning filters apply to the whole process.
    with warnings.catch_warnings(), ThreadPoolExecutor(_READERS) as pool:
        warnings.simplefilter("ignore")  # unusual metadata do not matter here
        bar = tqdm(
            pool.map(fault_of, suspects),  # Pillow releases the GIL while decoding
            total=len(suspects),
            desc="checking images",
            unit="img",
            leave=False,
            disable=None if progress else True,
        )
        faults = {path: fault for path, fault in zip(suspects, bar, strict=True) if fault}
    if cache_file is not None:
        _write_cache(cache_file, list(faults))
    return faults


def describe_faults(faults: Sequence[str], limit: int = 20) -> str:
    """Format a list of unusable files, one per line.

    Args:
        faults: Path and reason of each file.
        limit: Largest number of files to list.

    Returns:
        Lines for a log or an error message.
    """
    lines = [f"  {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        lines.append(f"  ... and {len(faults) - limit} more")
    return "\n".join(lines)


def _cache_file(paths: Sequence[str]) -> Path:
    """Return the cache file for the check of exactly these files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{os.path.abspath(path)}\0{state}\n".encode(errors="replace"))
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "selcon_plugin", "checked_images", digest.hexdigest()[:32] + ".json")


def _read_cache(cache_file: Path, paths: Sequence[str]) -> Sequence[str]:
    """Return the files to check: the cached unreadable ones, or all without a cache."""
    try:
        known = json.loads(cache_file.read_text())
    except (OSError, ValueError):
        return paths
    return known if isinstance(known, list) and set(known) <= set(paths) else paths


def _write_cache(cache_file: Path, unreadable: list[str]) -> None:
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(json.dumps(unreadable), cache_file)
    except OSError as error:  # a read-only home folder
        logger.debug("the result of the image check is not cached: %s", error)
