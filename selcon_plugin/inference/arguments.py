"""Checks of arguments that a caller easily confuses, such as one path with a list."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image


def check_list(name: str, values: Any, *, one: str = "value") -> list[Any]:
    """Return the elements of a list, tuple, set, array or generator.

    Args:
        name: Name of the argument.
        values: The argument.
        one: Name of one element, for the message.

    Returns:
        A list.

    Raises:
        ValueError: If it is one value where several are meant; a text would be taken for
            a list of letters, and an image for a list of rows of pixels.
    """
    is_one = isinstance(values, (str, bytes, os.PathLike, Image.Image))
    is_one = is_one or (isinstance(values, np.ndarray) and values.ndim in (0, 2, 3))
    if is_one or not isinstance(values, Iterable):
        is_short = isinstance(values, (str, os.PathLike, int, float))
        shown = repr(values) if is_short else type(values).__name__
        raise ValueError(
            f"{name} must be a list, got {shown}: pass [{one}] for a single {one}"
        )
    return list(values)


def check_texts(name: str, values: Any) -> list[str]:
    """Return a list of texts, such as names of cameras.

    Args:
        name: Name of the argument.
        values: The argument.

    Raises:
        ValueError: If it is no list, or contains anything else.
    """
    texts = check_list(name, values, one="name")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a list of texts, got {text!r}")
    return texts


def check_folder(name: str, folder: Any) -> str:
    """Return one path as text.

    Args:
        name: Name of the argument.
        folder: Text or path-like object.

    Raises:
        ValueError: If it is anything else, such as a list, or empty.
    """
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise ValueError(f"{name} must be one path, got {folder!r}")
    return os.fsdecode(folder)


def check_count(name: str, value: Any) -> int:
    """Return a whole number of at least 1.

    Args:
        name: Name of the argument.
        value: The argument.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return int(value)


def check_cosine(name: str, value: Any) -> float:
    """Return a cosine.

    Args:
        name: Name of the argument.
        value: The argument.

    Raises:
        ValueError: If it is no number between -1 and 1.
    """
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not -1.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a cosine between -1 and 1, got {value!r}")
    return float(value)
