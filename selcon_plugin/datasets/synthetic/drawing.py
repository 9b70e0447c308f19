"""Rendering of one synthetic person in a given pose on a transparent sheet.

At a yaw of 0 degrees the person faces the camera, at 90 walks to the right, and at 180
shows the back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from selcon_plugin.datasets.synthetic.looks import Color, Garment, Look
from selcon_plugin.datasets.synthetic.sheet import (
    CENTER_X,
    SHEET_SIZE,
    Paint,
    Point,
    Sheet,
    ellipse_points,
    rounded_box_points,
    smooth_noise,
    trapezoid,
)

_FLOOR_Y = 372.0
_BODY_HEIGHT = 344.0


@dataclass(frozen=True)
class Pose:
    """Pose of a person in one image.

    Attributes:
        yaw: Walking direction in degrees; 0 faces the camera, 90 is to the right.
        phase: Phase of the walking cycle in radians.
        stride: Largest angle of a leg to the vertical, in radians.
        light: Direction of the light, -1 (left) to 1 (right).
    """

    yaw: float
    phase: float
    stride: float
    light: float


@dataclass(frozen=True)
class _Frame:
    """Measures of a body in a pose, in sheet pixels."""

    cos: float
    sin: float
    height: float
    half_width: float  # of the shoulders, after projection
    shoulder_y: float
    hip_y: float

    @property
    def top_y(self) -> float:
        return _FLOOR_Y - self.height


def draw_person(look: Look, pose: Pose, rng: np.random.Generator) -> Image.Image:
    """Render a person on a transparent sheet, with the feet near the lower edge.

    Args:
        look: Appearance of the person.
        pose: Pose of the person and direction of the light.
        rng: Random generator for the folds in the clothes; its state advances.

    Returns:
        An RGBA image of `SHEET_SIZE`.
    """
    frame = _measure(look, pose)
    upper = _texture(look.upper)
    lower = _texture(look.lower)
    sheet = Sheet()
    sides = (1, -1) if frame.sin > 0 else (-1, 1)  # the far side of the body first
    far, near = sides
    if look.bag == "backpack" and frame.cos > -0.2:
        _draw_backpack(sheet, look, frame)
    if look.hair == "long" and frame.cos > -0.2:
        _draw_long_hair(sheet, look, frame)
    _draw_arm(sheet, look, pose, frame, far, _darker(upper, 0.72))
    _draw_leg(sheet, look, pose, frame, far, _darker(lower, 0.74))
    _draw_leg(sheet, look, pose, frame, near, lower)
    _draw_torso(sheet, look, frame, upper, lower)
    _draw_head(sheet, look, frame)
    if look.hair == "long" and frame.cos <= -0.2:
        _draw_long_hair(sheet, look, frame)
    if look.bag == "backpack" and frame.cos <= -0.2:
        _draw_backpack(sheet, look, frame)
    _draw_straps(sheet, look, frame)
    _draw_arm(sheet, look, pose, frame, near, upper)
    return _shade(sheet, pose, rng)


def _measure(look: Look, pose: Pose) -> _Frame:
    """Compute the positions of shoulders and hips."""
    yaw = math.radians(pose.yaw)
    height = _BODY_HEIGHT * look.height
    bob = 0.008 * height * abs(math.sin(pose.phase))
    half_width = 0.118 * height * look.build * (0.62 + 0.38 * abs(math.cos(yaw)))
    return _Frame(
        cos=math.cos(yaw),
        sin=math.sin(yaw),
        height=height,
        half_width=half_width,
        shoulder_y=_FLOOR_Y - 0.82 * height + bob,
        hip_y=_FLOOR_Y - 0.49 * height + bob,
    )


def _draw_leg(
    sheet: Sheet, look: Look, pose: Pose, frame: _Frame, side: int, paint: Paint
) -> None:
    """Draw one leg with its shoe; `side` is 1 for the person's left."""
    height = frame.height
    angle = side * pose.stride * math.sin(pose.phase)
    bend = max(0.0, -angle) * 0.9
    lift = 0.03 * height * max(0.0, -angle) * abs(frame.cos)
    hip = (CENTER_X + side * 0.42 * frame.half_width * frame.cos, frame.hip_y)
    knee = (
        hip[0] + 0.24 * height * math.sin(angle) * frame.sin,
        hip[1] + 0.24 * height * math.cos(angle),
    )
    ankle = (
        knee[0] + 0.22 * height * math.sin(angle - bend) * frame.sin,
        knee[1] + 0.22 * height * math.cos(angle - bend) - lift,
    )
    width = 0.088 * height * look.build
    toe = 0.045 * height * frame.sin
    shoe_center = (ankle[0] + 0.5 * toe, ankle[1] + 0.012 * height)
    skin = _shade_color(look.skin, 0.9)
    if look.lower.cut == "trousers":
        sheet.limb((hip, knee, ankle), (width * 1.1, width * 0.86, width * 0.66), paint)
    else:
        length = 0.75 if look.lower.cut == "shorts" else 0.2
        hem = (hip[0] + length * (knee[0] - hip[0]), hip[1] + length * (knee[1] - hip[1]))
        sheet.limb((hip, knee, ankle), (width, width * 0.7, width * 0.46), skin)
        sheet.limb((hip, hem), (width * 1.15, width * 1.1), paint)
    sheet.ellipse(shoe_center, 0.026 * height + 0.5 * abs(toe), 0.02 * height, look.shoes)


def _draw_arm(
    sheet: Sheet, look: Look, pose: Pose, frame: _Frame, side: int, paint: Paint
) -> None:
    """Draw one arm with its hand and, on its side, the handbag."""
    height = frame.height
    angle = -0.8 * side * pose.stride * math.sin(pose.phase)
    spread = side * (0.02 + 0.03 * look.build) * frame.cos
    shoulder = (
        CENTER_X + side * 0.92 * frame.half_width * frame.cos,
        frame.shoulder_y + 0.035 * height,
    )
    elbow = (
        shoulder[0] + height * (0.16 * math.sin(angle) * frame.sin + 0.6 * spread),
        shoulder[1] + 0.16 * height * math.cos(angle),
    )
    hand = (
        elbow[0] + 0.15 * height * math.sin(angle + 0.35) * frame.sin,
        elbow[1] + 0.15 * height * math.cos(angle + 0.35 * abs(frame.sin)),
    )
    width = 0.062 * height * look.build
    sheet.limb((shoulder, elbow, hand), (width, width * 0.8, width * 0.6), look.skin)
    if look.bag == "handbag" and side == look.bag_side:
        _draw_handbag(sheet, look, frame, hand)
    if look.upper.cut == "t-shirt":
        cuff = (
            0.35 * shoulder[0] + 0.65 * elbow[0],
            0.35 * shoulder[1] + 0.65 * elbow[1],
        )
        sheet.limb((shoulder, cuff), (width * 1.25, width * 1.2), paint)
    else:
        wrist = (0.15 * elbow[0] + 0.85 * hand[0], 0.15 * elbow[1] + 0.85 * hand[1])
        sleeve: Paint = look.upper.second_color if look.upper.cut == "vest" else paint
        widths = (width * 1.2, width * 1.02, width * 0.85)
        sheet.limb((shoulder, elbow, wrist), widths, sleeve)


def _draw_torso(
    sheet: Sheet, look: Look, frame: _Frame, upper: Paint, lower: Paint
) -> None:
    """Draw hips, skirt or coat, and chest with its print."""
    height, half = frame.height, frame.half_width
    top, hip = frame.shoulder_y, frame.hip_y
    if look.lower.cut == "skirt":
        sheet.polygon(trapezoid(hip - 8, hip + 0.22 * height, half * 0.8, half), lower)
    sheet.polygon(trapezoid(hip - 12, hip + 10, half * 0.74, half * 0.76), lower)
    hem = {"coat": hip + 0.17 * height, "jacket": hip + 8}.get(look.upper.cut, hip + 2)
    outline = [
        (CENTER_X - 0.32 * half, top - 5),
        (CENTER_X + 0.32 * half, top - 5),
        (CENTER_X + 0.96 * half, top + 9),
        (CENTER_X + half, top + 24),
        (CENTER_X + 0.84 * half, 0.45 * top + 0.55 * hip),
        (CENTER_X + 0.86 * half, hem),
        (CENTER_X - 0.86 * half, hem),
        (CENTER_X - 0.84 * half, 0.45 * top + 0.55 * hip),
        (CENTER_X - half, top + 24),
        (CENTER_X - 0.96 * half, top + 9),
    ]
    sheet.polygon(outline, upper)
    middle = CENTER_X + 0.55 * half * frame.sin
    if frame.cos > 0.15:
        if look.upper.cut in ("jacket", "coat"):
            opening = 0.26 * half * frame.cos
            inner = _shade_color(look.upper.second_color, 1.0)
            sheet.polygon(
                trapezoid(top - 3, hem - 2, opening, opening * 0.8, middle), inner
            )
        if look.upper.pattern == "logo":
            _draw_print(sheet, look, frame, middle, 0.42)
    elif frame.cos < -0.15 and look.upper.pattern == "back-print":
        _draw_print(sheet, look, frame, CENTER_X - 0.3 * half * frame.sin, 0.55)


def _draw_print(
    sheet: Sheet, look: Look, frame: _Frame, middle: float, size: float
) -> None:
    """Draw a logo on the chest or a large print on the back."""
    radius = size * frame.half_width
    center = (middle, frame.shoulder_y + 0.13 * frame.height)
    color = look.upper.second_color
    if look.upper.period % 2:
        sheet.ellipse(center, radius * abs(frame.cos), radius, color)
    else:
        sheet.polygon(
            trapezoid(
                center[1] - radius, center[1] + radius, radius * abs(frame.cos), 2.0, middle
            ),
            color,
        )


def _draw_head(sheet: Sheet, look: Look, frame: _Frame) -> None:
    """Draw neck, hair and face."""
    height = frame.height
    center = (CENTER_X + 0.012 * height * frame.sin, frame.top_y + 0.073 * height)
    radius_x, radius_y = 0.047 * height, 0.066 * height
    neck = (CENTER_X, frame.shoulder_y)
    sheet.limb((center, neck), (0.05 * height,) * 2, _shade_color(look.skin, 0.82))
    crown: Color = look.skin if look.hair == "bald" else look.hair_color
    sheet.ellipse(center, radius_x * 1.06, radius_y * 1.02, crown)
    if look.hair == "bun":
        bun = (center[0] - 1.0 * radius_x * frame.sin, center[1] - 0.75 * radius_y)
        sheet.ellipse(bun, 0.024 * height, 0.022 * height, look.hair_color)
    if frame.cos > -0.35:
        face_width = radius_x * (0.86 if frame.cos > 0.5 else 0.66)
        face_x = center[0] + 0.35 * radius_x * frame.sin
        face = (face_x, center[1] + 0.2 * radius_y)
        sheet.ellipse(face, face_width, radius_y * 0.78, look.skin)
        eyes = (face_x + 0.25 * face_width * frame.sin, center[1] + 0.05 * radius_y)
        dark = _shade_color(look.skin, 0.45)
        for shift in (-0.42, 0.42):
            eye = (eyes[0] + shift * face_width, eyes[1])
            sheet.ellipse(eye, 2.6, 1.8, dark)
    if look.hair == "cap":
        cap_y = center[1] - 0.25 * radius_y
        points = ellipse_points((center[0], cap_y), radius_x * 1.12, radius_y * 0.85)
        color = look.upper.second_color
        sheet.polygon([(x, min(y, cap_y)) for x, y in points], color)
        brim = (center[0] + 0.9 * radius_x * frame.sin, cap_y)
        if frame.cos > -0.35:
            sheet.ellipse(brim, radius_x * 0.9, 3.5, _shade_color(color, 0.75))


def _draw_long_hair(sheet: Sheet, look: Look, frame: _Frame) -> None:
    """Draw hair that falls onto the shoulders."""
    height = frame.height
    back = CENTER_X - 0.022 * height * frame.sin
    top = frame.top_y + 0.05 * height
    bottom = frame.shoulder_y + 0.07 * height
    half = 0.056 * height * (0.7 + 0.3 * abs(frame.cos))
    sheet.polygon(trapezoid(top, bottom, half * 0.85, half, back), look.hair_color)


def _draw_backpack(sheet: Sheet, look: Look, frame: _Frame) -> None:
    """Draw a backpack, which is fully visible from behind and partly from the side."""
    half = frame.half_width
    center_x = CENTER_X - frame.sin * (0.95 * half)
    center_y = frame.shoulder_y + 0.15 * frame.height
    radius_x = half * (0.42 + 0.42 * abs(frame.cos))
    radius_y = 0.125 * frame.height
    body = rounded_box_points((center_x, center_y), radius_x, radius_y)
    sheet.polygon(body, look.bag_color)
    if frame.cos <= -0.2:
        pocket = (center_x, center_y + 0.4 * radius_y)
        points = rounded_box_points(pocket, radius_x * 0.72, radius_y * 0.42)
        sheet.polygon(points, _shade_color(look.bag_color, 0.72))


def _draw_straps(sheet: Sheet, look: Look, frame: _Frame) -> None:
    """Draw backpack straps as seen from the front, or a shoulder bag and its strap."""
    half, top, hip = frame.half_width, frame.shoulder_y, frame.hip_y
    dark = _shade_color(look.bag_color, 0.8)
    if look.bag == "backpack" and frame.cos > 0.1:
        for side in (-1, 1):
            x = CENTER_X + side * 0.58 * half * frame.cos + 0.2 * half * frame.sin
            strap = ((x, top), (x + side * 2, top + 0.17 * frame.height))
            sheet.limb(strap, (9.0, 8.0), look.bag_color)
    elif look.bag == "shoulder":
        lateral = look.bag_side * frame.cos
        end = (CENTER_X + 0.85 * half * lateral, hip - 4)
        sheet.limb(((CENTER_X - 0.6 * half * lateral, top), end), (6.5, 6.5), dark)
        if look.bag_side * frame.sin < 0.35:  # otherwise the body hides the bag
            points = rounded_box_points((end[0], hip + 6), 0.075 * frame.height, 22.0)
            sheet.polygon(points, look.bag_color)
            flap = trapezoid(hip - 14, hip + 2, 0.07 * frame.height, 20.0, end[0])
            sheet.polygon(flap, dark)


def _draw_handbag(sheet: Sheet, look: Look, frame: _Frame, hand: Point) -> None:
    """Draw a handbag below a hand."""
    half = 0.062 * frame.height * (0.75 + 0.25 * abs(frame.sin))
    top = hand[1] + 16
    dark = _shade_color(look.bag_color, 0.7)
    for side in (-1, 1):
        sheet.limb((hand, (hand[0] + side * 0.6 * half, top)), (3.5, 3.5), dark)
    sheet.polygon(trapezoid(top, top + 34, half * 0.85, half, hand[0]), look.bag_color)


def _shade(sheet: Sheet, pose: Pose, rng: np.random.Generator) -> Image.Image:
    """Shade the body by directional light and add folds to the clothes."""
    soft = sheet.mask.filter(ImageFilter.BoxBlur(9))
    shift = round(9 * pose.light)
    relief = np.asarray(ImageChops.offset(soft, shift, 3), dtype=np.float32)
    light = (np.asarray(soft, dtype=np.float32) - relief) / 255.0
    folds = smooth_noise(rng, SHEET_SIZE, (14, 22))
    factor = 0.92 + 0.75 * light + 0.10 * folds
    picture = np.asarray(sheet.picture, dtype=np.float32) * factor[..., None]
    picture += 12.0 * np.maximum(factor - 0.95, 0.0)[..., None]
    shaded = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    shaded.putalpha(sheet.mask)
    return shaded


def _texture(garment: Garment) -> Paint:
    """Return a garment's color or, if it has a pattern, a sheet filled with the pattern."""
    if garment.pattern not in _PATTERNS:
        return garment.color
    width, height = SHEET_SIZE
    sheet = Image.new("RGB", SHEET_SIZE, garment.color)
    x = np.arange(width)[None, :] - width // 2
    y = np.arange(height)[:, None]
    chosen = np.broadcast_to(
        _PATTERNS[garment.pattern](x, y, garment.period), (height, width)
    )
    stencil = Image.fromarray(chosen.astype(np.uint8) * 255)
    sheet.paste(garment.second_color, (0, 0), stencil)
    return sheet


def _stripes(position: NDArray[np.int_], period: int) -> NDArray[np.bool_]:
    return position % period < period // 2


_PATTERNS: dict[
    str, Callable[[NDArray[np.int_], NDArray[np.int_], int], NDArray[np.bool_]]
] = {
    "horizontal-stripes": lambda x, y, period: _stripes(y, period),
    "vertical-stripes": lambda x, y, period: _stripes(x, period),
    "checks": lambda x, y, period: _stripes(x, period) ^ _stripes(y, period),
    "dots": lambda x, y, period: (
        (x % period - period // 2) ** 2 + (y % period - period // 2) ** 2
        < (0.3 * period) ** 2
    ),
    "block": lambda x, y, period: y > 120 + period,
    "chest-band": lambda x, y, period: (y > 92 + period) & (y < 100 + 2 * period),
}


def _darker(paint: Paint, factor: float) -> Paint:
    """Darken a paint, since limbs on the far side lie in the body's shadow."""
    if isinstance(paint, tuple):
        return _shade_color(paint, factor)
    return paint.point(lambda value: value * factor)


def _shade_color(color: Color, factor: float) -> Color:
    """Scale a color's brightness."""
    red, green, blue = (min(int(channel * factor), 255) for channel in color)
    return (red, green, blue)
