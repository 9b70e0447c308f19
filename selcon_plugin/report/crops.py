"""Crops inside a report: small JPEG pictures within a budget of bytes."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from selcon_plugin.datasets.reading import ImageReadError, read_rgb

# Together with text and drawings a page stays below 10 MB.
MAX_CROP_BYTES = 3_500_000
MAX_SPRITE_BYTES = 4_500_000

_CROP = (64, 128)
_SPRITE_CELL = (40, 80)
_SPRITE_COLUMNS = 50
_QUALITIES = (72, 50, 30)


@dataclass(frozen=True)
class Sprite:
    """Many crops in one picture, row by row.

    Attributes:
        uri: The picture as a ``data:`` URI.
        columns: Crops in a row.
        rows: Rows.
        cell: Width and height of a crop in pixels.
    """

    uri: str
    columns: int
    rows: int
    cell: tuple[int, int]


class Crops:
    """Makes ``data:`` URIs of image files.

    Args:
        enabled: Whether pictures are made at all; a report without pictures keeps the
            crops private.
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
            The URI; empty without pictures, for a file that cannot be read, and after the
            budget is used up.
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
        """Put crops side by side into one picture.

        Args:
            paths: Image files; one that cannot be read leaves its place gray.

        Returns:
            The picture, of lower quality where it would be too large; None without
            pictures, or where even that is too large.
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
    """Shorten paths by the folders that all files share.

    Args:
        paths: Files.

    Returns:
        The shortened paths.

    Example:
        >>> short_paths(["/data/a/1.jpg", "/data/b/1.jpg"])
        ['a/1.jpg', 'b/1.jpg']
    """
    folders = {os.path.dirname(path) for path in paths}
    try:
        shared = os.path.commonpath(folders) if folders else ""
    except ValueError:  # relative and absolute ones, or several drives
        shared = ""
    if not shared:
        return list(paths)
    return [Path(os.path.relpath(path, shared)).as_posix() for path in paths]
