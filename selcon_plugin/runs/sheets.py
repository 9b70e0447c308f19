"""Contact sheets: rows of images, each with a frame, and a title for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selcon_plugin.datasets.reading import ImageReadError, read_rgb

BACKGROUND = (255, 255, 255)
TEXT_COLOR = (32, 32, 32)
FRAME_COLOR = (64, 64, 64)
FRAME = 4  # width of a frame, in pixels
GAP = 4  # between two images
LINE = 18  # height of a line of text


@dataclass(frozen=True)
class SheetRow:
    """A row of a contact sheet.

    Attributes:
        title: Text above the images.
        paths: Image files, in their order on the sheet.
    """

    title: str
    paths: Sequence[str]


def draw_sheet(
    rows: Sequence[SheetRow], *, columns: int, image_size: tuple[int, int]
) -> Image.Image:
    """Draw groups of images, one row for each.

    Of a group with more images than columns, evenly spaced ones are shown, the first and
    the last among them. An image that cannot be read is gray.

    Args:
        rows: The groups.
        columns: Maximum number of images in a row, at least 2.
        image_size: Width and height of each image on the sheet, in pixels.

    Returns:
        The sheet.

    Raises:
        ValueError: If there are no rows, or fewer than 2 columns.
    """
    if not rows:
        raise ValueError("there are no groups of images to draw")
    if columns < 2:
        raise ValueError(f"columns must be 2 or more, got {columns}")
    font = sheet_font()
    cell = (image_size[0] + 2 * FRAME, image_size[1] + 2 * FRAME)
    widest = max(min(columns, len(row.paths)) * (cell[0] + GAP) for row in rows)
    longest = math.ceil(max(font.getlength(row.title) for row in rows))
    height = LINE + cell[1] + 2 * GAP
    size = (max(widest, longest + GAP) + GAP, len(rows) * height + GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        y = GAP + number * height
        draw.text((GAP, y), row.title, fill=TEXT_COLOR, font=font)
        shown = min(columns, len(row.paths))
        places = np.linspace(0, len(row.paths) - 1, shown).round().astype(int)
        for column, place in enumerate(places):
            image = framed_thumbnail(row.paths[place], image_size, FRAME_COLOR)
            sheet.paste(image, (GAP + column * (cell[0] + GAP), y + LINE))
    return sheet


def framed_thumbnail(
    path: str, size: tuple[int, int], color: tuple[int, int, int]
) -> Image.Image:
    """Read an image as :func:`thumbnail` does, and put a frame around it.

    Args:
        path: The file.
        size: Width and height of the image without the frame, in pixels.
        color: Color of the frame.

    Returns:
        The image, larger than `size` by the frame.
    """
    framed = Image.new("RGB", (size[0] + 2 * FRAME, size[1] + 2 * FRAME), color)
    framed.paste(thumbnail(path, size), (FRAME, FRAME))
    return framed


def thumbnail(path: str, size: tuple[int, int]) -> Image.Image:
    """Read an image, rotated as its EXIF data says, and resize it.

    Args:
        path: The file.
        size: Width and height in pixels.

    Returns:
        The image; gray if the file cannot be read.
    """
    try:
        return read_rgb(path).resize(size)
    except ImageReadError:
        return Image.new("RGB", size, "gray")


def sheet_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of the titles, which comes with Pillow."""
    try:
        return ImageFont.load_default(size=12)
    except TypeError:  # Pillow below 10.1 has its small bitmap font only
        return ImageFont.load_default()
