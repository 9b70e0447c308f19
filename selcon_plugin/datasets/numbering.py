"""Numbering of camera and identity names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNKNOWN = -1
# FastReID's names of the cameras of its data sets whose files count cameras from 1.
_OF_DATASET = re.compile(r"(?:market1501|dukemtmc|msmt17|cuhk03|veri|synthetic)_(\d+)")


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


class NamedNumber(int):
    """Number of a camera that keeps the camera's name, also if an offset is added.

    Attributes:
        name: The name.
    """

    name: str

    def __new__(cls, number: int, name: str) -> NamedNumber:
        """Create the number.

        Args:
            number: The number.
            name: The name.

        Returns:
            The number with its name.
        """
        self = super().__new__(cls, number)
        self.name = name
        return self

    def __add__(self, other: int) -> NamedNumber:
        return NamedNumber(int(self) + other, self.name)

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return NamedNumber, (int(self), self.name)


def camera_name(camera: Any) -> str:
    """Return the name of a camera as the user of a data set wrote it.

    The hosts count the cameras of their data sets from 0, where the names of the files
    count from 1; FastReID also adds the name of the data set.

    Args:
        camera: Name or number of the camera in a host.

    Returns:
        The name.

    Example:
        >>> [camera_name(camera) for camera in ("hall", 0, "market1501_5", "cam_2")]
        ['hall', '1', '6', 'cam_2']
    """
    if isinstance(camera, NamedNumber):
        return camera.name
    if isinstance(camera, int):
        return str(camera + 1)
    of_dataset = _OF_DATASET.fullmatch(str(camera))
    return str(int(of_dataset[1]) + 1) if of_dataset else str(camera)


def _order(name: Any) -> tuple[bool, Any]:
    return (False, name) if isinstance(name, int) else (True, str(name))
