"""Appearance of a synthetic person: body, hair, clothes, shoes and bag.

An identity is a combination of attributes, and persons form pairs with common attributes
(the same shirt with different trousers, the same colors in a different pattern).
Discriminating such a pair takes more than one color, as it does for real persons.
"""

from dataclasses import dataclass, replace

import numpy as np

Color = tuple[int, int, int]

FAMILY_SIZE = 2

_LOOK_STREAM = 1  # separates this random stream from those of the other modules

_CLOTH_COLORS: tuple[Color, ...] = (
    (28, 28, 32),  # black
    (92, 94, 98),  # gray
    (226, 226, 222),  # white
    (34, 44, 92),  # navy
    (52, 96, 184),  # blue
    (142, 188, 222),  # light blue
    (186, 34, 40),  # red
    (110, 28, 44),  # maroon
    (226, 122, 40),  # orange
    (228, 200, 62),  # yellow
    (52, 128, 66),  # green
    (94, 98, 52),  # olive
    (208, 184, 144),  # beige
    (112, 74, 46),  # brown
    (112, 62, 142),  # purple
    (226, 136, 164),  # pink
    (40, 140, 144),  # teal
)
_SHOE_COLORS: tuple[Color, ...] = (
    (26, 26, 28),
    (232, 232, 228),
    (112, 72, 44),
    (176, 40, 42),
    (60, 80, 130),
)
_HAIR_COLORS: tuple[Color, ...] = (
    (24, 20, 20),
    (62, 42, 30),
    (118, 78, 44),
    (196, 160, 98),
    (140, 56, 34),
    (150, 150, 150),
)
_SKIN_COLORS: tuple[Color, ...] = (
    (236, 200, 176),
    (220, 176, 146),
    (190, 140, 108),
    (142, 98, 72),
    (96, 64, 48),
)
_UPPER_CUTS = ("t-shirt", "long-sleeve", "jacket", "coat", "vest")
_UPPER_PATTERNS = (
    "plain",
    "plain",
    "horizontal-stripes",
    "vertical-stripes",
    "checks",
    "dots",
    "block",
    "chest-band",
    "logo",
    "back-print",
)
_LOWER_CUTS = ("trousers", "trousers", "shorts", "skirt")
_LOWER_PATTERNS = ("plain", "plain", "plain", "horizontal-stripes", "checks")
_HAIR_STYLES = ("short", "short", "long", "bun", "bald", "cap")
_BAGS = ("none", "backpack", "backpack", "shoulder", "handbag")


@dataclass(frozen=True)
class Garment:
    """Piece of clothing with a cut, two colors and a pattern."""

    cut: str
    color: Color
    second_color: Color
    pattern: str
    period: int


@dataclass(frozen=True)
class Look:
    """Appearance shared by all images of one person."""

    height: float
    build: float
    skin: Color
    hair: str
    hair_color: Color
    upper: Garment
    lower: Garment
    shoes: Color
    bag: str
    bag_color: Color
    bag_side: int


def make_look(seed: int, family: int, member: int) -> Look:
    """Sample the look of one member of a family; equal arguments give equal looks.

    Member 0 is the family's template. Each other member shares with it, depending on the
    sum of both numbers, the upper garment's colors; the upper garment and the shoes; the
    lower garment and the bag; or the colors of all clothes, but not their cuts and
    patterns.

    Args:
        seed: Seed of the data set, at least 0.
        family: Number of the family, at least 0.
        member: Number of the person in the family, at least 0.

    Returns:
        The look.
    """
    first = _sample_look(np.random.default_rng([seed, _LOOK_STREAM, family, 0]))
    if member == 0:
        return first
    own = _sample_look(np.random.default_rng([seed, _LOOK_STREAM, family, member]), first)
    kind = (family + member) % 4
    if kind == 1:
        return replace(own, upper=first.upper, shoes=first.shoes)
    if kind == 2:
        return replace(own, lower=first.lower, bag=first.bag, bag_color=first.bag_color)
    if kind == 3:
        upper = replace(
            own.upper, color=first.upper.color, second_color=first.upper.second_color
        )
        lower = replace(own.lower, color=first.lower.color)
        return replace(own, upper=upper, lower=lower)
    return replace(own, upper=replace(first.upper, pattern=own.upper.pattern))


def _sample_look(rng: np.random.Generator, other_than: Look | None = None) -> Look:
    """Sample a look; its clothes, hair and bag differ from those of `other_than`."""
    upper = _sample_garment(
        rng, _UPPER_CUTS, _UPPER_PATTERNS, other_than.upper if other_than else None
    )
    lower = _sample_garment(
        rng, _LOWER_CUTS, _LOWER_PATTERNS, other_than.lower if other_than else None
    )
    return Look(
        height=rng.uniform(0.93, 1.05),
        build=rng.uniform(0.86, 1.18),
        skin=_jitter(rng, _pick_color(rng, _SKIN_COLORS)),
        hair=_pick(rng, _HAIR_STYLES, other_than.hair if other_than else None),
        hair_color=_jitter(rng, _pick_color(rng, _HAIR_COLORS)),
        upper=upper,
        lower=lower,
        shoes=_jitter(rng, _pick_color(rng, _SHOE_COLORS)),
        bag=_pick(rng, _BAGS, other_than.bag if other_than else None),
        bag_color=_jitter(rng, _pick_color(rng, _CLOTH_COLORS)),
        bag_side=int(rng.choice((-1, 1))),
    )


def _sample_garment(
    rng: np.random.Generator,
    cuts: tuple[str, ...],
    patterns: tuple[str, ...],
    other_than: Garment | None,
) -> Garment:
    """Sample a garment with a color and pattern different from those of `other_than`."""
    taken = (other_than.color,) if other_than else ()
    color = _pick_color(rng, _CLOTH_COLORS, taken)
    second_color = _pick_color(rng, _CLOTH_COLORS, (*taken, color))
    return Garment(
        cut=_pick(rng, cuts),
        color=_jitter(rng, color),
        second_color=_jitter(rng, second_color),
        pattern=_pick(rng, patterns, other_than.pattern if other_than else None),
        period=int(rng.integers(20, 40)),
    )


def _pick(
    rng: np.random.Generator, choices: tuple[str, ...], taken: str | None = None
) -> str:
    """Sample an entry other than `taken`."""
    free = [choice for choice in choices if choice != taken]
    return free[int(rng.integers(len(free)))]


def _pick_color(
    rng: np.random.Generator, colors: tuple[Color, ...], taken: tuple[Color, ...] = ()
) -> Color:
    """Sample a color clearly different from every color in `taken`."""
    free = [
        color
        for color in colors
        if all(sum(abs(a - b) for a, b in zip(color, t, strict=True)) > 90 for t in taken)
    ]
    return free[int(rng.integers(len(free)))]


def _jitter(rng: np.random.Generator, color: Color) -> Color:
    """Perturb a color slightly, since no two blue shirts have the same blue."""
    red, green, blue = (int(min(max(c + rng.normal(0.0, 7.0), 0), 255)) for c in color)
    return (red, green, blue)
