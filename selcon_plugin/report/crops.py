"""Crops embedded in a report: small JPEG images within a size limit."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from selcon_plugin.datasets.reading import ImageReadError, read_rgb

# With these limits (in bytes) a page with all its text and charts stays below 10 MB.
MAX_CROP_BYTES = 3_500_000
MAX_SPRITE_BYTES = 4_500_000

_CROP = (64, 128)
_SPRITE_CELL = (40, 80)
_SPRITE_COLUMNS = 50
_QUALITIES = (72, 50, 30)


@dataclass(frozen=True)
class Sprite:
    """A sprite sheet: many crops in one image, row by row.

    Attributes:
        uri: The image as a ``data:`` URI.
        columns: Crops per row.
        rows: Number of rows.
        cell: Width and height of a crop in pixels.
    """

    uri: str
    columns: int
    rows: int
    cell: tuple[int, int]


class Crops:
    """An encoder of image files as ``data:`` URIs.

    Args:
        enabled: Whether to embed images at all; a report without images keeps the crops
            private.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.num_missing = 0
        self._left = MAX_CROP_BYTES
        self._made: dict[str, str] = {}

    def uri(self, path: str) -> str:
        """Return a crop as a ``data:`` URI; each file is read once.

        Args:
            path: Image file.

        Returns:
            The URI; empty if images are disabled, if the file cannot be read, or if the
            size limit is reached.
        """
        if not self.enabled:
            return ""
        if path not in self._made:
            image = self._read(path, _CROP)
            made = "" if image is None else _jpeg_uri(image, _QUALITIES[0])
            self._made[path] = made if len(made) <= self._left else ""
            self._left -= len(self._made[path])
        return self._made[path]

    def sprite(self, paths: Sequence[str]) -> Sprite | None:
        """Combine crops into one image.

        Args:
            paths: Image files; the cell of an unreadable one stays gray.

        Returns:
            The sprite sheet, with a lower JPEG quality if it would be too large; None if
            images are disabled, if there are no paths, or if the lowest quality is still
            too large.
        """
        if not self.enabled or not paths:
            return None
        columns = min(_SPRITE_COLUMNS, len(paths))
        rows = -(-len(paths) // columns)
        width, height = _SPRITE_CELL
        sheet = Image.new("RGB", (columns * width, rows * height), (128, 128, 128))
        for number, path in enumerate(paths):
            image = self._read(path, _SPRITE_CELL)
            if image is not None:
                sheet.paste(image, (number % columns * width, number // columns * height))
        for quality in _QUALITIES:
            uri = _jpeg_uri(sheet, quality)
            if len(uri) <= MAX_SPRITE_BYTES:
                return Sprite(uri, columns, rows, _SPRITE_CELL)
        return None

    def _read(self, path: str, size: tuple[int, int]) -> Image.Image | None:
        try:
            return read_rgb(path).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        except (ImageReadError, OSError):
            self.num_missing += 1
            return None


def _jpeg_uri(image: Image.Image, quality: int) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def short_paths(paths: Sequence[str]) -> list[str]:
    """Remove the common parent folders of all paths.

    Args:
        paths: Paths of files.

    Returns:
        The shortened paths.

    Example:
        >>> short_paths(["/data/a/1.jpg", "/data/b/1.jpg"])
        ['a/1.jpg', 'b/1.jpg']
    """
    folders = {os.path.dirname(path) for path in paths}
    try:
        shared = os.path.commonpath(folders) if folders else ""
    except ValueError:  # relative and absolute paths mixed, or several drives
        shared = ""
    if not shared:
        return list(paths)
    return [Path(os.path.relpath(path, shared)).as_posix() for path in paths]
