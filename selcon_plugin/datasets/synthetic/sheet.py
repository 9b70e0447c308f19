"""Transparent drawing surface, and the shapes that compose a body.

The sheet is about three times as large as the final image, so downscaling it smooths the
outlines. Coordinates are in sheet pixels, x to the right and y downwards.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from selcon_plugin.datasets.synthetic.looks import Color

SHEET_SIZE = (192, 384)
CENTER_X = 96.0

Point = tuple[float, float]
Paint = Color | Image.Image


class Sheet:
    """Image and mask, painted part by part from back to front."""

    def __init__(self) -> None:
        self.picture = Image.new("RGB", SHEET_SIZE)
        self.mask = Image.new("L", SHEET_SIZE)
        self._pen = ImageDraw.Draw(self.picture)
        self._mask_pen = ImageDraw.Draw(self.mask)

    def polygon(self, points: Sequence[Point], paint: Paint) -> None:
        """Fill a polygon with a color or with the matching part of a texture."""
        self._mask_pen.polygon(points, fill=255)
        if isinstance(paint, tuple):
            self._pen.polygon(points, fill=paint)
            return
        left = max(int(min(x for x, _ in points)), 0)
        top = max(int(min(y for _, y in points)), 0)
        right = min(int(max(x for x, _ in points)) + 2, SHEET_SIZE[0])
        bottom = min(int(max(y for _, y in points)) + 2, SHEET_SIZE[1])
        if right <= left or bottom <= top:
            return  # completely outside of the sheet
        stencil = Image.new("L", (right - left, bottom - top))
        shifted = [(x - left, y - top) for x, y in points]
        ImageDraw.Draw(stencil).polygon(shifted, fill=255)
        self.picture.paste(paint.crop((left, top, right, bottom)), (left, top), stencil)

    def ellipse(
        self, center: Point, radius_x: float, radius_y: float, paint: Paint
    ) -> None:
        """Fill an upright ellipse."""
        self.polygon(ellipse_points(center, radius_x, radius_y), paint)

    def limb(self, points: Sequence[Point], widths: Sequence[float], paint: Paint) -> None:
        """Fill a rounded, tapered band along a polyline."""
        for (start, end), (w0, w1) in zip(
            itertools.pairwise(points),
            itertools.pairwise(widths),
            strict=True,
        ):
            self.polygon(_band_points(start, end, w0 / 2, w1 / 2), paint)
        for point, width in zip(points, widths, strict=True):
            self.ellipse(point, width / 2, width / 2, paint)


def smooth_noise(
    rng: np.random.Generator, size: tuple[int, int], grid: tuple[int, int]
) -> NDArray[np.float32]:
    """Generate low-frequency noise.

    Args:
        rng: Random generator; its state advances.
        size: Width and height of the result in pixels.
        grid: Number of independent values horizontally and vertically.

    Returns:
        Array of shape ``(height, width)`` with values mostly in -1 to 1.
    """
    coarse = rng.normal(0.0, 0.5, size=(grid[1], grid[0])).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def _band_points(
    start: Point, end: Point, half_start: float, half_end: float
) -> list[Point]:
    """Return the corners of a band that narrows from `half_start` to `half_end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = max(math.hypot(dx, dy), 1e-6)
    nx, ny = -dy / length, dx / length
    return [
        (start[0] + nx * half_start, start[1] + ny * half_start),
        (end[0] + nx * half_end, end[1] + ny * half_end),
        (end[0] - nx * half_end, end[1] - ny * half_end),
        (start[0] - nx * half_start, start[1] - ny * half_start),
    ]


def trapezoid(
    top: float, bottom: float, half_top: float, half_bottom: float, x: float = CENTER_X
) -> list[Point]:
    """Return the corners of an upright trapezoid around `x`."""
    return [
        (x - half_top, top),
        (x + half_top, top),
        (x + half_bottom, bottom),
        (x - half_bottom, bottom),
    ]


def ellipse_points(center: Point, radius_x: float, radius_y: float) -> list[Point]:
    """Return twenty points on an ellipse."""
    return [(center[0] + radius_x * c, center[1] + radius_y * s) for c, s in _CIRCLE]


def rounded_box_points(center: Point, radius_x: float, radius_y: float) -> list[Point]:
    """Return twenty points on a rounded box."""
    return [
        (
            center[0] + radius_x * math.copysign(abs(c) ** 0.4, c),
            center[1] + radius_y * math.copysign(abs(s) ** 0.4, s),
        )
        for c, s in _CIRCLE
    ]


_CIRCLE = [(math.cos(math.tau * k / 20), math.sin(math.tau * k / 20)) for k in range(20)]
