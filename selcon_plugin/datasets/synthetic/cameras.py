"""Cameras of the synthetic data set, and the rendering of their images.

Each camera has its own scene, direction, lens and sensor: illumination, white balance,
contrast, sharpness and compression differ so much that images of two persons from one
camera are often more similar than images of one person from two cameras.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from selcon_plugin.datasets.synthetic.drawing import Pose, draw_person
from selcon_plugin.datasets.synthetic.looks import Color, Look, make_look
from selcon_plugin.datasets.synthetic.scenes import SCENE_SIZE, draw_scene
from selcon_plugin.datasets.synthetic.sheet import SHEET_SIZE, smooth_noise

IMAGE_SIZE = (64, 128)
MAX_CAMERAS = 9

_CROP_WIDTH = 150  # detectors crop persons tightly
_PASSER_BY_FAMILY = 1_000_000


@dataclass(frozen=True)
class Camera:
    """Parameters of a camera.

    Attributes:
        gains: White balance as factors on red, green and blue.
        gamma: Exponent on brightness; above 1 darkens.
        saturation: Factor on colors; 0 is gray.
        contrast: Factor on differences in brightness.
        haze: Weight of a uniform light blended into the image.
        blur: Radius of the lens blur in pixels of the final image.
        resolution: Fraction of the pixels that the sensor resolves.
        noise: Standard deviation of the sensor noise on a scale of 255.
        quality: JPEG quality.
        facing: Most frequent yaw of persons in degrees.
        scale: Size of persons relative to the image.
        light: Direction of the light, -1 (left) to 1 (right).
        occlusion: Fraction of images with an occluder in front of the person.
        wall: Kind and color of the background.
        floor: Kind and color of the ground.
    """

    gains: tuple[float, float, float]
    gamma: float
    saturation: float
    contrast: float
    haze: float
    blur: float
    resolution: float
    noise: float
    quality: int
    facing: float
    scale: float
    light: float
    occlusion: float
    wall: tuple[str, Color]
    floor: tuple[str, Color]


# fmt: off
_CAMERAS = (
    Camera((1.00, 1.00, 0.99), 0.98, 0.96, 1.00, 0.02, 0.34, 1.00, 3.0, 86,
           0, 1.10, -0.8, 0.06, ("bricks", (150, 92, 74)), ("tiles", (142, 138, 130))),
    Camera((0.91, 0.98, 1.09), 1.09, 0.90, 0.98, 0.02, 0.46, 0.94, 3.9, 82,
           180, 1.07, 0.7, 0.10, ("glass", (96, 124, 140)), ("asphalt", (88, 90, 94))),
    Camera((1.10, 1.00, 0.85), 1.04, 0.96, 1.02, 0.01, 0.40, 0.97, 3.6, 84,
           75, 1.09, 0.3, 0.08, ("doors", (196, 178, 142)), ("planks", (140, 104, 66))),
    Camera((0.99, 1.02, 0.96), 0.83, 0.84, 0.94, 0.08, 0.43, 0.94, 3.3, 84,
           205, 1.12, -0.4, 0.08, ("hedge", (78, 112, 62)), ("gravel", (178, 168, 148))),
    Camera((0.96, 1.05, 0.94), 1.19, 0.86, 1.04, 0.01, 0.52, 0.90, 4.5, 79,
           285, 1.08, 0.9, 0.12, ("concrete", (128, 130, 124)), ("tiles", (104, 110, 100))),
    Camera((1.04, 0.97, 1.05), 0.94, 0.88, 0.92, 0.05, 0.55, 0.88, 3.6, 80,
           20, 1.06, -0.9, 0.10, ("railing", (168, 182, 196)), ("asphalt", (120, 116, 98))),
    Camera((1.06, 1.01, 0.91), 0.89, 1.00, 1.04, 0.02, 0.37, 0.97, 3.3, 85,
           150, 1.11, 0.5, 0.08, ("bricks", (176, 160, 138)), ("gravel", (150, 140, 124))),
    Camera((0.93, 0.99, 1.05), 1.14, 0.82, 0.96, 0.04, 0.49, 0.91, 4.2, 80,
           260, 1.06, -0.6, 0.12, ("doors", (122, 140, 158)), ("tiles", (90, 96, 108))),
    Camera((1.01, 1.00, 0.98), 1.00, 0.74, 1.06, 0.01, 0.43, 0.93, 3.9, 80,
           340, 1.09, 0.1, 0.10, ("railing", (110, 104, 98)), ("planks", (112, 96, 80))),
)
# fmt: on


@dataclass(frozen=True)
class Track:
    """Parameters shared by all images of one person from one camera."""

    yaw: float
    phase: float
    stride: float
    scale: float
    scene_x: int
    brightness: float


def make_track(camera: int, rng: np.random.Generator) -> Track:
    """Sample the track of a person past a camera.

    Args:
        camera: Number of the camera, from 0.
        rng: Random generator; its state advances.

    Returns:
        The track.
    """
    view = _CAMERAS[camera]
    yaw = view.facing + rng.normal(0.0, 40.0)
    if rng.random() < 0.4:
        yaw += 180.0  # some persons walk in the opposite direction
    return Track(
        yaw=yaw,
        phase=rng.uniform(0.0, math.tau),
        stride=rng.uniform(0.25, 0.55),
        scale=view.scale * rng.uniform(0.93, 1.05),
        scene_x=int(rng.integers(0, SCENE_SIZE[0] - SHEET_SIZE[0])),
        brightness=rng.uniform(0.85, 1.15),
    )


def take_picture(
    look: Look, camera: int, track: Track, seed: int, rng: np.random.Generator
) -> Image.Image:
    """Render one image of a person.

    Args:
        look: Appearance of the person.
        camera: Number of the camera, from 0.
        track: Track of the person past this camera.
        seed: Seed of the data set, which determines the camera's scene.
        rng: Random generator for the variation between images; its state advances.

    Returns:
        An RGB image of `IMAGE_SIZE`, before compression.
    """
    view = _CAMERAS[camera]
    scene = draw_scene(seed, camera, view.wall, view.floor)
    left = int(np.clip(track.scene_x + rng.normal(0, 25), 0, scene.width - SHEET_SIZE[0]))
    top = int(rng.integers(0, scene.height - SHEET_SIZE[1]))
    canvas = scene.crop((left, top, left + SHEET_SIZE[0], top + SHEET_SIZE[1]))
    if rng.random() < 0.08:
        _put_passer_by(canvas, view, rng, behind=True)
    pose = Pose(
        yaw=track.yaw + rng.normal(0.0, 12.0),
        phase=track.phase + rng.uniform(0.0, math.pi),
        stride=track.stride,
        light=view.light,
    )
    scale = track.scale * rng.uniform(0.95, 1.05)
    offset = (rng.normal(0.0, 7.0), rng.normal(0.0, 8.0))
    _put_person(canvas, draw_person(look, pose, rng), scale, offset)
    if rng.random() < view.occlusion:
        _put_obstacle(canvas, view, rng)
    return _expose(canvas, view, track.brightness, rng)


def jpeg_quality(camera: int) -> int:
    """Return the JPEG quality of a camera, numbered from 0."""
    return _CAMERAS[camera].quality


def _put_person(
    canvas: Image.Image, person: Image.Image, scale: float, offset: tuple[float, float]
) -> None:
    """Paste a person with a soft shadow at the feet."""
    width, height = (round(side * scale) for side in SHEET_SIZE)
    person = person.resize((width, height), Image.Resampling.BILINEAR)
    x = round((SHEET_SIZE[0] - width) / 2 + offset[0])
    y = round((SHEET_SIZE[1] - height) / 2 + offset[1])
    feet = y + round(0.97 * height)
    shadow = Image.new("L", (width, 40))
    ImageDraw.Draw(shadow).ellipse((0.18 * width, 10, 0.82 * width, 30), fill=120)
    canvas.paste((18, 18, 22), (x, feet - 22), shadow.filter(ImageFilter.BoxBlur(6)))
    canvas.paste(person, (x, y), person)


def _put_passer_by(
    canvas: Image.Image, view: Camera, rng: np.random.Generator, *, behind: bool
) -> None:
    """Paste a passer-by partly outside of the image, behind or in front of the person."""
    passer_by = make_look(0, _PASSER_BY_FAMILY + int(rng.integers(10_000)), 0)
    pose = Pose(
        yaw=view.facing + rng.normal(0.0, 60.0),
        phase=rng.uniform(0.0, math.tau),
        stride=rng.uniform(0.2, 0.5),
        light=view.light,
    )
    side = rng.choice((-1.0, 1.0))
    if behind:
        scale, offset = rng.uniform(0.55, 0.8), (side * rng.uniform(35, 85), -30.0)
    else:
        scale, offset = rng.uniform(0.95, 1.1), (side * rng.uniform(68, 95), 14.0)
    _put_person(canvas, draw_person(passer_by, pose, rng), scale, offset)


def _put_obstacle(canvas: Image.Image, view: Camera, rng: np.random.Generator) -> None:
    """Occlude a part of the person by a passer-by, a post, a bin or a bush."""
    kind = int(rng.integers(4))
    if kind == 0:
        _put_passer_by(canvas, view, rng, behind=False)
        return
    pen = ImageDraw.Draw(canvas)
    tone = int(rng.integers(40, 130))
    color = (tone, min(tone + 8, 255), tone - 6)
    x = float(rng.uniform(20, 172))
    if kind == 1:
        half = rng.uniform(8, 18)
        pen.rectangle((x - half, 0, x + half, 384), fill=color)
        pen.rectangle((x - half, 0, x - 0.3 * half, 384), fill=(tone + 30,) * 3)
    elif kind == 2:
        top, half = rng.uniform(235, 310), rng.uniform(35, 70)
        pen.rectangle((x - half, top, x + half, 384), fill=color)
        pen.rectangle((x - half - 4, top, x + half + 4, top + 9), fill=(tone + 40,) * 3)
    else:
        for _ in range(60):
            cx, cy = x + rng.normal(0, 30), 384 - abs(rng.normal(0, 60))
            leaf = int(rng.integers(40, 110))
            pen.ellipse((cx - 9, cy - 7, cx + 9, cy + 7), fill=(leaf // 2, leaf, leaf // 3))


def _expose(
    canvas: Image.Image, view: Camera, brightness: float, rng: np.random.Generator
) -> Image.Image:
    """Apply the camera's lens and sensor model to a scene."""
    small = [max(round(side * view.resolution), 8) for side in IMAGE_SIZE]
    margin = (SHEET_SIZE[0] - _CROP_WIDTH) // 2
    box = (margin, 0, margin + _CROP_WIDTH, SHEET_SIZE[1])
    picture = canvas.resize((small[0], small[1]), Image.Resampling.BOX, box=box)
    picture = picture.resize(IMAGE_SIZE, Image.Resampling.BICUBIC)
    picture = picture.filter(ImageFilter.GaussianBlur(view.blur * rng.uniform(0.6, 1.4)))
    pixels = np.asarray(picture, dtype=np.float32) / 255.0
    shade = 1.0 + 0.16 * smooth_noise(rng, IMAGE_SIZE, (2, 3))
    pixels = pixels * (brightness * shade * rng.uniform(0.92, 1.08))[..., None]
    pixels = np.power(np.clip(pixels, 0.0, 1.0), view.gamma)
    gains = np.asarray(view.gains) * rng.uniform(0.96, 1.04, size=3)
    pixels = pixels * gains.astype(np.float32)
    gray = pixels.mean(axis=2, keepdims=True)
    pixels = gray + view.saturation * (pixels - gray)
    pixels = 0.45 + view.contrast * (pixels - 0.45)
    pixels = (1.0 - view.haze) * pixels + view.haze * 0.75
    grain = rng.normal(0.0, view.noise / 255.0, size=pixels.shape)
    return Image.fromarray(
        np.clip((pixels + grain) * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
    )
