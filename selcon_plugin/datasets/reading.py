"""One reader of images for both hosts, and a check of many files at once."""

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

# What Pillow warns of by default: 256 MiB in RGB. A larger image would take the memory of
# every process that reads it, and is no crop of a person.
MAX_PIXELS = 89_478_485

# The machine's faults, not the file's: no other image would be read either.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_READERS = 8
# Below, a check takes less than a second and is not worth a file.
_WORTH_REMEMBERING = 1000


class ImageReadError(OSError):
    """An image file cannot be used; the message holds path and reason."""


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read any image file as 8-bit RGB.

    Rotated as its EXIF data says. Gray, palette and CMYK are converted, 16 bits of gray
    become the 8 upper ones, transparency lies on black, of an animation the first frame is
    taken. What cannot be used is refused: truncated or empty files, files of another kind
    whatever their name, folders and pipes, floating-point images, and more than
    :data:`MAX_PIXELS`.

    Args:
        path: The file.

    Returns:
        The image.

    Raises:
        ImageReadError: If the file cannot be used; names it and says why.
        MemoryError: If the machine is out of memory.
        OSError: If it is out of memory or file handles.
    """
    try:
        return _read(path)
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in _EXHAUSTED:
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
        return error.strerror  # without the path, which stands there already
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or of an unknown format"
    return str(error) or type(error).__name__


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
        )
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data: the pixels are still good
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white")
    if image.mode.startswith("I"):
        # Pillow would cut the values off at 255: all white.
        pixels = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image.convert("RGB")


def fault_of(path: str | os.PathLike[str]) -> str:
    """Say why a file cannot be used as an image.

    Args:
        path: The file.

    Returns:
        Path and reason; ``""`` for a good file.
    """
    try:
        read_rgb(path)
    except ImageReadError as error:
        return str(error)
    return ""


def find_unreadable(paths: Sequence[str], *, progress: bool = True) -> dict[str, str]:
    """Decode many files once, several at a time.

    Of 1,000 files and more it is remembered, in ``$XDG_CACHE_HOME/selcon_plugin`` or
    ``~/.cache/selcon_plugin``, which were good: as long as names, sizes and times of change
    are the same, only the others are looked at again.

    Args:
        paths: Files.
        progress: Whether to draw a progress bar on a terminal.

    Returns:
        Path and reason by path, of those that cannot be used; in the given order.
    """
    memory = None
    suspects = paths
    if len(paths) >= _WORTH_REMEMBERING:
        memory = _memory_of(paths)
        suspects = _remembered(memory, paths)
    # Set here, not in each thread: the filters are the whole process's.
    with warnings.catch_warnings(), ThreadPoolExecutor(_READERS) as pool:
        warnings.simplefilter("ignore")  # oddities of metadata do not matter here
        bar = tqdm(
            pool.map(fault_of, suspects),  # Pillow decodes outside the interpreter lock
            total=len(suspects),
            desc="checking images",
            unit="img",
            leave=False,
            disable=None if progress else True,
        )
        faults = {path: fault for path, fault in zip(suspects, bar, strict=True) if fault}
    if memory is not None:
        _remember(memory, list(faults))
    return faults


def describe_faults(faults: Sequence[str], limit: int = 20) -> str:
    """List what cannot be used, a line each.

    Args:
        faults: Path and reason of each file.
        limit: Lines at most.

    Returns:
        Lines for a log or an error.
    """
    lines = [f"  {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        lines.append(f"  ... and {len(faults) - limit} more")
    return "\n".join(lines)


def _memory_of(paths: Sequence[str]) -> Path:
    """Return where it is kept which of these very files were good."""
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


def _remembered(memory: Path, paths: Sequence[str]) -> Sequence[str]:
    """Return the files that have to be looked at: all where nothing is known of them."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return paths
    return known if isinstance(known, list) and set(known) <= set(paths) else paths


def _remember(memory: Path, unreadable: list[str]) -> None:
    # Two processes that check the same images at once write the same content, and a file
    # that is cut off is read as none.
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(json.dumps(unreadable), memory)
    except OSError as error:  # a home that cannot be written to
        logger.debug("the check of the images is not remembered: %s", error)
