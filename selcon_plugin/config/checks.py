"""Checks of a config before anything is built; errors name key, value and remedy."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml

from selcon_plugin.options import Option

_BASE_KEY = "_BASE_"
_MARK = "_selcon_checked"  # attribute of a config, none of its keys
# Set between the check and what relies on it, to what needs none.
_SET_LATER = ("MODEL.HEADS.NUM_CLASSES",)


def mark_checked(cfg: Any) -> None:
    """Note in a config that it has been checked as it is.

    Args:
        cfg: The host's config; copies of it are marked, too.
    """
    cfg.__dict__[_MARK] = _content(cfg)


def is_checked(cfg: Any) -> bool:
    """Tell whether a config has been checked, and no value was changed since."""
    return bool(cfg.__dict__.get(_MARK) == _content(cfg))


def _content(cfg: Mapping[str, Any]) -> str:
    flat = flatten_config(cfg)
    return repr({key: value for key, value in flat.items() if key not in _SET_LATER})


def check_values(cfg: Mapping[str, Any], options: Iterable[Option]) -> None:
    """Check keys of a host, which checks none itself.

    Args:
        cfg: The host's config.
        options: What is legal; an option's name is the full key.
    """
    for option in options:
        option.check(value_of(cfg, option.name))


def value_of(cfg: Mapping[str, Any], key: str) -> Any:
    """Return the value of a full key, for instance ``"SOLVER.MAX_EPOCH"``."""
    return reduce(lambda node, name: node[name], key.split("."), cfg)


def check_name(key: str, name: str, known: Iterable[str], remedy: str = "") -> None:
    """Refuse a name that nothing is registered under.

    Args:
        key: Full key, for the error.
        name: Its value.
        known: Names there are.
        remedy: What else to do; after the known names.

    Raises:
        ValueError: If the name is not among them; names the closest.
    """
    known = list(known)
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"{key} {name!r} is unknown: {hint}Known are {', '.join(known)}{remedy}"
    )


def check_size(key: str, size: Sequence[Any]) -> None:
    """Refuse what is no image size.

    Args:
        key: Full key, for the error.
        size: Height and width.

    Raises:
        ValueError: If it is anything else.
    """
    whole = [isinstance(side, int) and side >= 1 for side in size]
    if whole != [True, True]:
        raise ValueError(
            f"{key} must be height and width, whole numbers >= 1, such as [256, 128], got "
            f"{list(size)}"
        )


def check_device(key: str, device: str) -> None:
    """Refuse a device that does not exist.

    Without CUDA ``"cuda"`` passes, the default of hosts: they fall back on the CPU.

    Args:
        key: Full key, for the error.
        device: ``"cpu"``, ``"cuda"``, or ``"cuda:0"`` and so on.

    Raises:
        ValueError: If it is another.
    """
    count = torch.cuda.device_count()
    known = ["cpu", "cuda", *(f"cuda:{number}" for number in range(count))]
    if device not in known:
        raise ValueError(
            f"{key} must be one of {', '.join(known)} on this machine, which has {count} "
            f"GPUs, got {device!r}"
        )


def make_output_folder(key: str, folder: str) -> None:
    """Make the folder of a run, and find out at once whether it can be written to.

    Args:
        key: Its config key, for the error.
        folder: Path.

    Raises:
        ValueError: If the name is empty, or the folder cannot be made or written to.
    """
    if not folder:
        raise ValueError(f"{key} is empty: name a folder for checkpoints and results")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{key} {folder!r} is no folder that can be written to: {error.strerror}. Name "
            "another"
        ) from error


def read_config_file(file: str, source: str = "--config-file") -> dict[str, Any]:
    """Read a config file as plain YAML, after whatever it is based on.

    Args:
        file: Its path.
        source: Who names the file, for the error.

    Returns:
        Its own keys, those of its ``_BASE_`` left out.

    Raises:
        FileNotFoundError: If there is no such file, or no such base.
        ValueError: If it, or a base, is not YAML of keys and values, has a tag that would
            make an object, or is its own base.
    """  # noqa: DOC502  (raised by the functions called here)
    return _read_chain(file, source)[0]


def read_config_tree(
    file: str, prepare: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Read a config file together with what it is based on.

    Args:
        file: Its path.
        prepare: Called with the content of each file before they are merged.

    Returns:
        All keys; what a file sets takes the place of what its ``_BASE_`` does.

    Raises:
        FileNotFoundError: If there is no such file, or no such base.
        ValueError: If a file cannot be read, or a key is a group in one file only.
    """  # noqa: DOC502  (raised by the functions called here)
    merged: dict[str, Any] = {}
    for content in reversed(_read_chain(file, "--config-file")):
        prepare(content)
        _merge_into(merged, {k: v for k, v in content.items() if k != _BASE_KEY})
    return merged


def _merge_into(tree: dict[str, Any], content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, dict) and key in tree:
            if not isinstance(tree[key], dict):
                raise ValueError(f"{key} is a group of keys here, and a value in its base")
            _merge_into(tree[key], value)
        else:
            tree[key] = value


def _read_chain(file: str, source: str) -> list[dict[str, Any]]:
    """Read a file, its base, the base's base, and so on."""
    chain = [_read_yaml(file, source)]
    seen, base = {Path(file).resolve()}, file
    while _BASE_KEY in chain[-1]:
        source, name = f"{_BASE_KEY} in {base}", str(chain[-1][_BASE_KEY])
        # Relative to the file that names it.
        base = str(Path(base).parent / Path(name).expanduser())
        content = _read_yaml(base, source)
        if Path(base).resolve() in seen:
            raise ValueError(f"{source} leads back to {base}: name another base, or none")
        seen.add(Path(base).resolve())
        chain.append(content)
    return chain


def _read_yaml(file: str, source: str) -> dict[str, Any]:
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{source} {file!r} is a folder: name a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{source} {file!r} does not exist")
    if path.suffix == ".py":
        raise ValueError(f"{source} {file!r} is a program: configs are YAML files")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{file} is refused: {error.problem} ({error.problem_mark}). A config holds "
            "plain values: take the tag out"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if content is None:
        raise ValueError(f"{file} is empty: it has no keys")
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no config: it must hold lines KEY: value")
    return content


def flatten_config(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config, or of a dict of dicts, by their full keys.

    Args:
        node: Config or dict.
        prefix: Put before each key.

    Returns:
        For instance ``{"SOLVER.MAX_EPOCH": 20, ...}``.
    """
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat.update(flatten_config(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
