"""Config files, their bases and the configs of the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selcon_plugin.io.atomic import make_folder
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.io.plain_yaml import Group, read_yaml, read_yaml_values
from selcon_plugin.values import Raw, is_blank, is_empty

_BASE_KEY = "_BASE_"
_FOLDER = "configs"
_SOURCE = "the config"
_SUFFIXES = (".yml", ".yaml")


@dataclass(frozen=True)
class Setting:
    """A key of a config file or of a command line.

    Attributes:
        value: What was written; None for a key with a group that has no keys.
        place: File and line, or the command line, for messages.
    """

    value: Raw | None
    place: str


# --- configs of the package ---------------------------------------------------------------


def _builtin_folder() -> Path:
    package = Path(__file__).parents[1]
    installed = package / _FOLDER
    return installed if installed.is_dir() else package.parent / _FOLDER


def builtin_configs() -> list[str]:
    """Return the names of the configs in the package, below ``configs/``."""
    folder = _builtin_folder()
    found = [file for file in folder.rglob("*") if file.suffix in _SUFFIXES]
    return sorted(file.relative_to(folder).as_posix() for file in found)


def builtin_config(name: str) -> str:
    """Return the path of a config that is part of the package.

    Args:
        name: File name below ``configs/``, with or without ``configs/`` in front.

    Returns:
        Path of the file, in an installed package or in a checkout.

    Raises:
        FileNotFoundError: If there is no such file; the message names similar ones.
    """
    name = name.removeprefix("./").removeprefix(f"{_FOLDER}/")
    names = builtin_configs()
    if name in names:
        return str(_builtin_folder() / name)
    raise FileNotFoundError(f"the package has no config {name!r}{_similar(name, names)}")


def _similar(name: str, names: list[str]) -> str:
    by_end = {known.rpartition("/")[2]: known for known in names} | {n: n for n in names}
    close = difflib.get_close_matches(name, by_end, n=3, cutoff=0.6)
    found = list(dict.fromkeys(by_end[end] for end in close))
    return f"; did you mean {' or '.join(found)}?" if found else ""


def find_config_file(file: str) -> str:
    """Return the path of a config: a file, or one of the package by its name.

    Args:
        file: Path of a file, or a name such as ``SyntheticPersons/scl.yml``.

    Returns:
        Path of the file; ``file`` itself if there is none.
    """
    path = Path(file).expanduser()
    if not file or path.exists() or path.is_absolute():
        return str(path) if file else file
    try:
        return builtin_config(path.as_posix())
    except FileNotFoundError:
        return str(path)


def copy_builtin_config(name: str, folder: str | Path = ".") -> list[Path]:
    """Copy a config of the package with its bases, to edit it.

    Args:
        name: As for :func:`builtin_config`.
        folder: Folder to copy into; created if missing.

    Returns:
        The written files, that of the name first.

    Raises:
        FileNotFoundError: If the package has no such config.
        FileExistsError: If a file is in the way.
        ValueError: If the folder is not writable.
    """  # noqa: DOC502  (raised by the functions called here)
    sources = [Path(file) for file, _ in read_chain(builtin_config(name))]
    targets = [Path(folder, source.name) for source in sources]
    check_output_folder("--output", str(folder))
    for target, source in zip(targets, sources, strict=True):
        if target.exists() and target.read_bytes() != source.read_bytes():
            raise FileExistsError(
                f"{target} exists already: remove it, or give another folder (--output)"
            )
    make_folder(folder)
    for target, source in zip(targets, sources, strict=True):
        target.write_bytes(source.read_bytes())
    return targets


# --- reading ------------------------------------------------------------------------------


def read_config_file(file: str, source: str = _SOURCE) -> dict[str, Any]:
    """Read a config file as plain values, and check the files that it is based on.

    Args:
        file: Path of the file, or the name of a config of the package.
        source: Origin of the path, for the error message.

    Returns:
        The keys of the file itself, nested, without those of its ``_BASE_``.

    Raises:
        FileNotFoundError: If the file, or a base, does not exist.
        ValueError: If the file, or a base, is not YAML with keys and values, sets a key
            twice, has a tag that would create an object, or is its own base.
    """  # noqa: DOC502  (raised by the functions called here)
    return read_yaml_values(read_chain(file, source)[0][0])


def read_top_keys(file: str, source: str = _SOURCE) -> list[str]:
    """Read the keys at the top of a config file and of the files that it is based on.

    Args:
        file: As for :func:`read_config_file`.
        source: As for :func:`read_config_file`.

    Returns:
        The keys without ``_BASE_``, each once.

    Raises:
        FileNotFoundError: As for :func:`read_config_file`.
        ValueError: As for :func:`read_config_file`.
    """  # noqa: DOC502  (raised by the functions called here)
    keys = [key for _, content in read_chain(file, source) for key in content.entries]
    return [key for key in dict.fromkeys(keys) if key != _BASE_KEY]


def read_chain(file: str, source: str = _SOURCE) -> list[tuple[str, Group]]:
    """Read a file, its base, the base's base, and so on.

    Args:
        file: As for :func:`read_config_file`.
        source: As for :func:`read_config_file`.

    Returns:
        Path and content of each file, the given one first.

    Raises:
        FileNotFoundError: As for :func:`read_config_file`.
        ValueError: As for :func:`read_config_file`.
    """  # noqa: DOC502  (raised by the functions called here)
    file = find_config_file(file)
    chain = [(file, _read(file, source))]
    seen = {Path(file).resolve()}
    while _BASE_KEY in chain[-1][1].entries:
        base, content = chain[-1]
        entry = content.entries[_BASE_KEY]
        source = f"{_BASE_KEY} in {base}, line {entry.line},"
        name = entry.value
        if isinstance(name, (Group, list)) or is_empty(name) or is_blank(name):
            raise ValueError(f"{source} must name one file")
        # Relative to the file that names it.
        base = str(Path(base).parent / Path(name.text).expanduser())
        content = _read(base, source)
        if Path(base).resolve() in seen:
            raise ValueError(f"{source} leads back to {base}: use another base, or none")
        seen.add(Path(base).resolve())
        chain.append((base, content))
    return chain


def settings_of(
    file: str, content: Group, prefix: str = ""
) -> Iterator[tuple[str, Setting]]:
    """Yield the settings of a config file by their full keys, without ``_BASE_``.

    Args:
        file: Path of the file, for messages.
        content: Its content.
        prefix: Prefix of each key.

    Yields:
        Full key and setting.
    """
    for key, entry in content.entries.items():
        if key == _BASE_KEY and not prefix:
            continue
        place = f"{file}, line {entry.line}"
        if isinstance(entry.value, Group) and entry.value.entries:
            yield from settings_of(file, entry.value, f"{prefix}{key}.")
        else:
            value = None if isinstance(entry.value, Group) else entry.value
            yield f"{prefix}{key}", Setting(value, place)


def _read(file: str, source: str) -> Group:
    check_config_file(file, source)
    return read_yaml(Path(file))


def check_config_file(file: str, source: str) -> None:
    """Check that a config file exists, before it is read.

    Args:
        file: Path of the file.
        source: Name of the option or argument, for the error message.

    Raises:
        FileNotFoundError: If it does not exist; the message names similar ones.
        ValueError: If it is a folder, or a program.
    """
    path, named = Path(file), f"{source} {file!r}".lstrip()
    if path.is_dir():
        raise ValueError(f"{named} is a folder: give a file in it")
    if not path.is_file():
        raise FileNotFoundError(
            f"{named} does not exist{_similar(file, builtin_configs())}"
        )
    if path.suffix == ".py":
        raise ValueError(f"{named} is a program: configs are YAML files")
