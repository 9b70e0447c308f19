"""Rendering of the synthetic cameras' background scenes: a wall and a floor."""

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from selcon_plugin.datasets.synthetic.looks import Color
from selcon_plugin.datasets.synthetic.sheet import smooth_noise

SCENE_SIZE = (640, 460)

_SCENE_STREAM = 2  # separates this random stream from those of the other modules
_FLOOR_LINE = 300
# With a high-contrast background, features depend on the camera more than on the person.
_SCENE_CONTRAST = 0.25

Span = tuple[int, int]


@functools.lru_cache(maxsize=16)
def draw_scene(
    seed: int, camera: int, wall: tuple[str, Color], floor: tuple[str, Color]
) -> Image.Image:
    """Render the background of a camera; the image is cached and must not be modified.

    Args:
        seed: Seed of the data set.
        camera: Number of the camera, from 0.
        wall: Kind and color of the background, such as ``("bricks", (150, 92, 74))``.
        floor: Kind and color of the ground.

    Returns:
        An RGB image of `SCENE_SIZE`, larger than an image of a person.
    """
    rng = np.random.default_rng([seed, _SCENE_STREAM, camera])
    scene = Image.new("RGB", SCENE_SIZE, wall[1])
    pen = ImageDraw.Draw(scene)
    _SURFACES[wall[0]](pen, (0, _FLOOR_LINE), wall[1], rng)
    pen.rectangle((0, _FLOOR_LINE, SCENE_SIZE[0], SCENE_SIZE[1]), fill=floor[1])
    _SURFACES[floor[0]](pen, (_FLOOR_LINE, SCENE_SIZE[1]), floor[1], rng)
    pen.rectangle(
        (0, _FLOOR_LINE - 8, SCENE_SIZE[0], _FLOOR_LINE), fill=_tone(wall[1], 0.6)
    )
    pixels: NDArray[np.floating] = np.asarray(scene, dtype=np.float32)
    light = 1.0 + 0.25 * smooth_noise(rng, SCENE_SIZE, (7, 5))
    grain = rng.normal(0.0, 5.0, size=pixels.shape[:2])
    pixels = pixels * light[..., None] + grain[..., None]
    pixels = 128.0 + _SCENE_CONTRAST * (pixels - 128.0)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _tone(color: Color, factor: float) -> Color:
    """Scale a color's brightness."""
    red, green, blue = (int(min(channel * factor, 255)) for channel in color)
    return (red, green, blue)


def _draw_blocks(
    pen: ImageDraw.ImageDraw,
    span: Span,
    color: Color,
    rng: np.random.Generator,
    size: tuple[int, int],
) -> None:
    """Cover a surface with rows of blocks, each row shifted by half a block."""
    width, height = size
    for row, y in enumerate(range(span[0], span[1], height)):
        for x in range(-(row % 2) * width // 2, SCENE_SIZE[0], width):
            fill = _tone(color, rng.uniform(0.86, 1.12))
            pen.rectangle((x + 1, y + 1, x + width - 2, min(y + height - 2, span[1])), fill)


def _draw_bricks(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw a brick wall with windows."""
    pen.rectangle((0, span[0], SCENE_SIZE[0], span[1]), fill=_tone(color, 0.7))
    _draw_blocks(pen, span, color, rng, (44, 20))
    for x in range(int(rng.integers(0, 150)), SCENE_SIZE[0], 260):
        pen.rectangle((x, 20, x + 96, 150), fill=(206, 206, 200))
        pen.rectangle((x + 8, 28, x + 88, 142), fill=(58, 70, 84))
        pen.line((x + 48, 28, x + 48, 142), fill=(206, 206, 200), width=5)


def _draw_tiles(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw a tiled floor."""
    pen.rectangle((0, span[0], SCENE_SIZE[0], span[1]), fill=_tone(color, 0.75))
    _draw_blocks(pen, span, color, rng, (70, 32))


def _draw_planks(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw a wooden floor."""
    _draw_blocks(pen, span, color, rng, (180, 18))


def _draw_glass(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw a glass front with reflections."""
    for x in range(0, SCENE_SIZE[0], 84):
        pen.rectangle((x, span[0], x + 84, span[1]), _tone(color, rng.uniform(0.6, 1.2)))
        shift = float(rng.uniform(0, 40))
        shine = [
            (x + shift, 0),
            (x + shift + 24, 0),
            (x + shift - 6, 300),
            (x + shift - 30, 300),
        ]
        pen.polygon(shine, fill=_tone(color, 1.3))
        pen.rectangle((x - 5, span[0], x + 5, span[1]), fill=(54, 58, 62))
    pen.rectangle((0, 186, SCENE_SIZE[0], 194), fill=(54, 58, 62))


def _draw_doors(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw a corridor's wall with doors and posters."""
    pen.rectangle((0, 190, SCENE_SIZE[0], span[1]), fill=_tone(color, 0.82))
    for x in range(int(rng.integers(10, 80)), SCENE_SIZE[0], 210):
        pen.rectangle((x - 7, 28, x + 107, span[1]), fill=_tone(color, 0.5))
        pen.rectangle((x, 36, x + 100, span[1]), fill=(128, 76, 50))
        pen.rectangle((x + 14, 52, x + 86, 150), outline=(92, 52, 36), width=5)
        pen.ellipse((x + 82, 172, x + 94, 184), fill=(214, 196, 120))
        poster = tuple(int(c) for c in rng.integers(60, 230, size=3))
        pen.rectangle((x + 132, 70, x + 182, 140), fill=(poster[0], poster[1], poster[2]))


def _draw_hedge(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw a hedge below a pale sky."""
    pen.rectangle((0, 0, SCENE_SIZE[0], 90), fill=(206, 214, 220))
    for _ in range(2600):
        x, y = rng.uniform(0, SCENE_SIZE[0]), rng.uniform(60, span[1])
        radius = rng.uniform(4, 12)
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, fill=_tone(color, rng.uniform(0.5, 1.35)))


def _draw_speckles(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw gravel."""
    for _ in range(2600):
        x, y = rng.uniform(0, SCENE_SIZE[0]), rng.uniform(span[0], span[1])
        pen.ellipse((x - 3, y - 2, x + 3, y + 2), fill=_tone(color, rng.uniform(0.75, 1.2)))


def _draw_asphalt(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw a road with a painted line."""
    for _ in range(900):
        x, y = rng.uniform(0, SCENE_SIZE[0]), rng.uniform(span[0], span[1])
        pen.ellipse((x - 2, y - 1, x + 2, y + 1), fill=_tone(color, rng.uniform(0.8, 1.2)))
    y = float(rng.uniform(span[0] + 20, span[1] - 40))
    pen.polygon([(0, y), (640, y + 24), (640, y + 36), (0, y + 12)], _tone(color, 2.0))


def _draw_concrete(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw concrete panels and pillars with signs."""
    _draw_blocks(pen, span, color, rng, (160, 100))
    for x in range(int(rng.integers(0, 120)), SCENE_SIZE[0], 230):
        pen.rectangle((x, span[0], x + 46, span[1]), fill=_tone(color, 0.7))
        pen.rectangle((x, span[0], x + 12, span[1]), fill=_tone(color, 1.2))
        pen.rectangle((x + 90, 60, x + 140, 110), fill=(40, 84, 150))


def _draw_railing(
    pen: ImageDraw.ImageDraw, span: Span, color: Color, rng: np.random.Generator
) -> None:
    """Draw a railing in front of distant houses."""
    for x in range(0, SCENE_SIZE[0], 90):
        top = float(rng.uniform(30, 130))
        pen.rectangle((x, top, x + 90, span[1]), fill=_tone(color, rng.uniform(0.5, 0.9)))
        for y in range(int(top) + 12, 200, 30):
            for shift in (14, 40, 66):
                pen.rectangle((x + shift, y, x + shift + 12, y + 14), _tone(color, 1.15))
    for x in range(0, SCENE_SIZE[0], 24):
        pen.line((x, 170, x, span[1]), fill=(70, 74, 78), width=5)
    pen.rectangle((0, 160, SCENE_SIZE[0], 172), fill=(84, 88, 92))


_SURFACES = {
    "bricks": _draw_bricks,
    "glass": _draw_glass,
    "doors": _draw_doors,
    "hedge": _draw_hedge,
    "concrete": _draw_concrete,
    "railing": _draw_railing,
    "tiles": _draw_tiles,
    "planks": _draw_planks,
    "gravel": _draw_speckles,
    "asphalt": _draw_asphalt,
}
