"""Loading and merging of config files and options, with errors that name the remedy."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selcon_plugin.compat.shared import prepare_torchvision
from selcon_plugin.config.checks import flatten_config, read_config_tree
from selcon_plugin.options import KINDS

if TYPE_CHECKING:
    from selcon_plugin.config.keys import ConfigKeys

# yacs: Type mismatch (<old type> vs. <new type>) with values (<old> vs. <new>) for ...
_MISMATCH = re.compile(r"with values \(.* vs\. (.*)\) for config key: (.*)", re.DOTALL)


def builtin_config(name: str) -> str:
    """Return the path of a config that is part of the package.

    Args:
        name: File name below ``configs/``.

    Returns:
        Path of the file, in an installed package or in a checkout.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"the package has no config {name!r}")


def import_files(files: Sequence[str]) -> None:
    """Import Python files, each only once per process.

    Args:
        files: Paths of files; the name of a file is that of its module.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is not a Python file.
    """
    for file in files:
        path = Path(file).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"--import {file!r} does not exist")
        if path.suffix != ".py":
            raise ValueError(
                f"--import {file!r} is not a Python file: its name must end in .py"
            )
        loaded = sys.modules.get(path.stem)
        if loaded is not None and getattr(loaded, "__file__", None) == str(path):
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        prepare_torchvision()  # the file may import timm before any host is prepared
        spec.loader.exec_module(module)


def merge_file(cfg: Any, keys: ConfigKeys, file: str) -> None:
    """Merge a config file into a config, in place.

    Args:
        cfg: Config of a host, not frozen.
        keys: The plugin's keys in it.
        file: Path of a YAML file.

    Raises:
        ValueError: If a key is unknown or a value is invalid; the message names similar
            keys or the valid values.
    """  # noqa: DOC502  (raised by the functions called here)
    with _explained(cfg, keys, file):
        cfg.merge_from_other_cfg(type(cfg)(read_config_tree(file, keys.rename_in_tree)))


def merge_options(cfg: Any, keys: ConfigKeys, opts: Sequence[str]) -> None:
    """Merge the ``KEY VALUE`` pairs of a command line into a config, in place.

    Args:
        cfg: Config of a host, not frozen.
        keys: The plugin's keys in it.
        opts: Alternating keys and values; values are parsed as Python literals.

    Raises:
        ValueError: If a value is missing, or as for :func:`merge_file`.
    """
    source = "the command line"
    if len(opts) % 2:
        raise ValueError(f"{source}: the key {opts[-1]} has no value: KEY VALUE")
    _merge_pairs(cfg, keys, opts, source)


def merge_overrides(cfg: Any, keys: ConfigKeys, overrides: Mapping[str, Any]) -> None:
    """Merge values by full keys into a config, in place.

    Args:
        cfg: Config of a host, not frozen.
        keys: The plugin's keys in it.
        overrides: Python values. A string stays as it is if the key has a string value;
            otherwise it is parsed as on a command line.

    Raises:
        ValueError: As for :func:`merge_file`.
    """  # noqa: DOC502  (raised by the functions called here)
    flat = flatten_config(cfg)
    pairs: list[Any] = []
    for key, value in overrides.items():
        # It is passed as a literal: yacs would parse the folder "2024" as a number.
        is_text = isinstance(value, str) and isinstance(flat.get(key), str)
        pairs += [key, repr(value) if is_text else value]
    _merge_pairs(cfg, keys, pairs, "the settings")


def _merge_pairs(cfg: Any, keys: ConfigKeys, pairs: Sequence[Any], source: str) -> None:
    pairs = keys.rename_pairs(pairs)
    for key in pairs[::2]:
        _check_key(cfg, key, source)
    with _explained(cfg, keys, source):
        cfg.merge_from_list(pairs)


def _check_key(cfg: Any, key: str, source: str) -> None:
    flat = flatten_config(cfg)
    if key in flat:
        return
    if any(known.startswith(f"{key}.") for known in flat):
        example = next(known for known in flat if known.startswith(f"{key}."))
        raise ValueError(f"{source}: {key} is a group of keys: set one, such as {example}")
    close = difflib.get_close_matches(key, flat, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"unknown config key {key} in {source}{hint}")


@contextlib.contextmanager
def _explained(cfg: Any, keys: ConfigKeys, source: str) -> Iterator[None]:
    """Convert yacs's errors in a merge into errors that name the remedy."""
    node = cfg
    for name in keys.path.split("."):
        node = node[name]
    try:
        with keys.allow_type_change(node):
            yield
    except KeyError as error:
        _check_key(cfg, str(error.args[0]).rpartition(": ")[2], source)
        raise
    except (AssertionError, ValueError) as error:
        mismatch = _MISMATCH.search(str(error))
        if mismatch is None:
            raise ValueError(f"{source}: {error}") from error
        value, key = mismatch.groups()
        legal = keys.describe(key) or KINDS.get(type(flatten_config(cfg).get(key)), "")
        # yacs does not accept an integer for a float: 1 must be written as 1.0.
        remedy = f"; it must be {legal}, written with its type (1.0, not 1)"
        raise ValueError(
            f"{source}: {value} does not fit {key}{remedy if legal else ''}"
        ) from error
