"""The reader of images for every command and host, and a parallel check of many files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import stat
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features
from tqdm import tqdm

from selcon_plugin.datasets.slow_reads import watch
from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.io.integrity import sealed_json, unsealed_json
from selcon_plugin.io.names import printable

logger = logging.getLogger(__name__)

# Formats that not every Pillow reads: AVIF since 11.3, both only if it was built with them.
OPTIONAL_FORMATS = ("WEBP", "AVIF")
# The formats that are read, by Pillow's names. Pillow knows some that run other programs
# (EPS starts Ghostscript) or open other files: they are not tried, whatever a file holds.
FORMATS = (
    *("JPEG", "PNG", "BMP", "TIFF", "GIF"),
    *(
        name
        for name, module in zip(OPTIONAL_FORMATS, ("webp", "avif"), strict=True)
        if module in features.modules and features.check_module(module)
    ),
)
# Bounds on what one image may cost: a file of a few KB may hold gigabytes of one color. A
# person crop is far below, a photo of 50 megapixels within.
MAX_PIXELS = 2**26
MAX_SIDE = 2**15
MAX_BYTES = 2**29
MAX_SECONDS = 60.0
# Images with more pixels are decoded one at a time in each process.
_LARGE = 2**22

# Faults of the machine, not of the file: no other image could be read either.
_RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_READERS = 8
# Checking fewer files takes less than a second and is not worth a cache file.
_MIN_CACHED_FILES = 1000

_ORIENTATION = 0x0112  # tag of the EXIF data, and how its values are turned upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_MODULES = {"JPEG": "Jpeg", "WEBP": "WebP"}
# Registered here, because Pillow would import all its formats to find one of them.
for _name in FORMATS:
    import_module(f"PIL.{_MODULES.get(_name, _name.title())}ImagePlugin")


class ImageReadError(OSError):
    """Error for an unusable image file; the message holds the path and the reason."""


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read any image file as 8-bit RGB.

    The image is rotated according to its EXIF data. Gray, palette and CMYK images are
    converted, 16-bit gray values keep their upper 8 bits, transparency is composited onto
    black, and only the first frame of an animation is read. :func:`as_rgb` gives the same
    pixels for the same picture in memory. Unusable files are refused: truncated or empty
    files, files of another type whatever their name, folders, pipes and devices (which are
    never opened), floating-point images, and images beyond :data:`MAX_PIXELS`,
    :data:`MAX_SIDE`, :data:`MAX_BYTES` or :data:`MAX_SECONDS`.

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
        with watch.reading(path), _open_file(path) as stream, _open_image(stream) as image:
            return _convert(image)
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in _RESOURCE_ERRORS:
            raise
        raise ImageReadError(f"{printable(path)}: {_reason(error)}") from error
    except Exception as error:
        # Pillow's decoders raise almost anything on a damaged file: SyntaxError, EOFError,
        # struct.error, IndexError, DecompressionBombError, ...
        raise ImageReadError(f"{printable(path)}: {_reason(error)}") from error


def as_rgb(image: Any) -> Image.Image:
    """Convert an image in memory to 8-bit RGB, with the pixels of its file's reading.

    Args:
        image: Pillow image of any mode, which is not changed; content of an image file as
            ``bytes``; path of an image file; or uint8 RGB array ``(h, w, 3)``.

    Returns:
        The image.

    Raises:
        ImageReadError: If it is a path or the content of an unusable file.
        ValueError: If it is of another type, or of a mode without a known white.
        MemoryError: If the machine is out of memory.
    """
    if isinstance(image, (str, Path)):
        return read_rgb(image)
    if isinstance(image, Image.Image):
        return _convert(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        try:
            with _open_image(io.BytesIO(image)) as opened:
                return _convert(opened)
        except MemoryError:
            raise
        except Exception as error:
            raise ImageReadError(
                f"image of {len(image)} bytes: {_reason(error)}"
            ) from error
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(
            "an image must be a path, a Pillow image, the bytes of an image file, or a "
            f"uint8 RGB array of shape (h, w, 3); got {array.dtype} of shape "
            f"{array.shape}: PIL.Image.fromarray makes a Pillow image of other arrays"
        )
    return Image.fromarray(np.ascontiguousarray(array))


class _TimedFile(io.BufferedReader):
    """File whose reading ends after :data:`MAX_SECONDS`; decoders read it in pieces."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._deadline = time.monotonic() + MAX_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as usual, or raise an error after the deadline."""
        if time.monotonic() > self._deadline:
            raise ValueError(f"decoding takes more than {MAX_SECONDS:g} s")
        return super().read(size)


def _open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file of a bounded size; anything else is not opened."""
    _check_file(os.stat(path))
    # Should a pipe take the file's place in between, opening it must not wait.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    stream = _TimedFile(io.FileIO(os.open(path, flags)))
    try:
        _check_file(os.fstat(stream.fileno()))
    except ValueError:
        stream.close()
        raise
    return stream


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    if not status.st_size:
        raise ValueError("empty file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{status.st_size} bytes are more than {MAX_BYTES}")


def _open_image(stream: Any) -> Image.Image:
    return Image.open(stream, formats=FORMATS)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which is already in the message
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not an image, or of an unknown format: {', '.join(FORMATS)} are read"
    return printable(str(error)) or type(error).__name__


_decoding_large = threading.Lock()


def _replace_lock() -> None:
    global _decoding_large
    _decoding_large = threading.Lock()


if hasattr(os, "register_at_fork"):  # a thread of the parent may hold it, and is not here
    os.register_at_fork(after_in_child=_replace_lock)


@contextlib.contextmanager
def _bounded(image: Image.Image) -> Iterator[None]:
    """Refuse an image of too many pixels, and let large ones pass one after the other."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
        )
    if max(image.size) > MAX_SIDE:
        raise ValueError(
            f"{image.width} x {image.height} pixels: a side is longer than {MAX_SIDE}"
        )
    with _decoding_large if pixels > _LARGE else contextlib.nullcontext():
        yield


def _convert(image: Image.Image) -> Image.Image:
    with _bounded(image):
        _load(image)
        transparent = "transparency" in image.info
        orientation = None
        with contextlib.suppress(Exception):  # with damaged EXIF data the pixels are usable
            orientation = image.getexif().get(_ORIENTATION)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known white")
        if image.mode.startswith("I"):
            image, transparent = _upper_bits(image), False
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or transparent:
            opaque = Image.new("RGBA", image.size, "black")
            image = Image.alpha_composite(opaque, image.convert("RGBA"))
        turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
        rgb = image.convert("RGB") if turn is None else image.convert("RGB").transpose(turn)
        rgb.info = {}  # read again, the result must not be turned a second time
        return rgb


def _load(image: Image.Image) -> None:
    """Decode an image.

    Pillow maps an uncompressed TIFF file into memory with height and width exchanged if its
    EXIF data turn it by 90 degrees (seen up to Pillow 13.0), which scrambles the pixels.
    Without its name the file is decoded instead, as for a file that :func:`read_rgb` opens.
    """
    name = getattr(image, "filename", "")
    if not name or image.format != "TIFF":
        image.load()
        return
    image.filename = ""  # type: ignore[attr-defined]
    try:
        image.load()
    finally:
        image.filename = name  # type: ignore[attr-defined]


def _upper_bits(image: Image.Image) -> Image.Image:
    """Return the upper 8 of 16 bits; Pillow clips at 255, which gives a white image."""
    values = np.asarray(image)
    if values.max(initial=0) > 0xFFFF:
        raise ValueError("32-bit pixels have no known white")
    return Image.fromarray((np.clip(values, 0, None) >> 8).astype(np.uint8))


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
        lines.append(f"  and {len(faults) - limit} others")
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
        known = unsealed_json(cache_file.read_bytes(), cache_file).get("unreadable")
    except (OSError, ValueError):
        return paths
    return known if isinstance(known, list) and set(known) <= set(paths) else paths


def _write_cache(cache_file: Path, unreadable: list[str]) -> None:
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(sealed_json({"unreadable": unreadable}), cache_file)
    except OSError as error:  # a read-only home folder
        logger.debug("the result of the image check is not cached: %s", error)
