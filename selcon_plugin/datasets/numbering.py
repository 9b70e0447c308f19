"""Numbering of camera and identity names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNKNOWN = -1


def number_names(names: Sequence[Any], *, unknown: Any = None) -> list[int]:
    """Number the distinct names 0, 1, ... in sorted order.

    Args:
        names: Name or number of each image's camera, or identity. Numbers are sorted
            numerically and before strings.
        unknown: Value in ``names`` for an unknown name.

    Returns:
        A number for each image; -1 for an unknown name.

    Example:
        >>> number_names(["hall", None, "door", "hall"])
        [1, -1, 0, 1]
    """
    known = sorted({name for name in names if name != unknown}, key=_order)
    number = {name: i for i, name in enumerate(known)}
    return [number.get(name, UNKNOWN) for name in names]


def _order(name: Any) -> tuple[bool, Any]:
    return (False, name) if isinstance(name, int) else (True, str(name))
