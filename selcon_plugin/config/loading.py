"""Loading and merging of config files and options, with errors that name the remedy."""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.files import Setting, read_chain, settings_of
from selcon_plugin.config.keys import ConfigKeys, describe_all
from selcon_plugin.options import KINDS, Option
from selcon_plugin.values import (
    Raw,
    RefusedValueError,
    Written,
    from_command_line,
    is_blank,
    is_empty,
    read_value,
    shown,
    written,
)

logger = logging.getLogger(__name__)

_COMMAND_LINE = "the command line"
_ITEMS: dict[type | None, str] = {
    int: " of whole numbers",
    float: " of numbers",
    str: " of texts",
}


class Merger:
    """Merging of files, command lines and Python values into a config, in place.

    The default of a key decides its type; see :mod:`selcon_plugin.values`.

    Args:
        cfg: Config of a host with its defaults, not frozen.
        keys: The plugin's keys in it.

    Attributes:
        given: Full keys that were set.
    """

    def __init__(self, cfg: Any, keys: ConfigKeys) -> None:
        self._cfg, self._keys = cfg, keys
        self._defaults = flatten_config(cfg)
        self._options = keys.options_by_key()
        self._optional = keys.optional_keys()
        self._places: dict[str, str] = {}
        self.given: set[str] = set()

    def merge_file(self, file: str) -> None:
        """Merge a config file with the files that it is based on.

        Args:
            file: Path of a YAML file, or the name of a config of the package.

        Raises:
            ValueError: If a key is unknown or a value has another type; the message names
                file, line and key, and similar keys or the valid values.
            FileNotFoundError: If the file, or a base, does not exist.
        """  # noqa: DOC502  (raised by the functions called here)
        for path, content in reversed(read_chain(file)):
            settings = self._keys.rename_entries(dict(settings_of(path, content)))
            for key, setting in settings.items():
                self._merge(key, setting)
                self._places[key] = setting.place

    def merge_options(self, opts: Sequence[str]) -> None:
        """Merge the ``KEY VALUE`` pairs of a command line.

        Args:
            opts: Alternating keys and values. If a key occurs several times with different
                values, the last one is used, with a warning.

        Raises:
            ValueError: If a value is missing, or as for :meth:`merge_file`.
        """  # noqa: DOC502  (raised by the functions called here)
        pairs = pairs_of(opts)
        given: dict[str, Setting] = {}
        for key, word in pairs:
            setting = Setting(from_command_line(word), _COMMAND_LINE)
            if key in given and given[key] != setting:
                logger.warning(
                    "%s is given twice, %s and %s: the last one is used",
                    *(key, given[key].value, word),
                )
            given[key] = setting
        for key, setting in self._keys.rename_entries(given).items():
            self._merge(key, setting)
            self._places.pop(key, None)

    def merge_overrides(self, overrides: Mapping[str, Any]) -> None:
        """Merge Python values by full keys.

        Args:
            overrides: Python values. A string stays as it is if the key has a string value;
                otherwise it is read as on a command line.

        Raises:
            ValueError: As for :meth:`merge_file`.
        """  # noqa: DOC502  (raised by the functions called here)
        given = {
            key: Setting(self._written(key, value), "the settings")
            for key, value in overrides.items()
        }
        for key, setting in self._keys.rename_entries(given).items():
            self._merge(key, setting)
            self._places.pop(key, None)

    def _written(self, key: str, value: Any) -> Raw:
        if isinstance(value, str) and self._kind(key) is not str:
            return from_command_line(value)
        try:
            return written(value)
        except TypeError as error:
            raise ValueError(f"the settings: {key}: {error}") from error

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Add file and line to an error about a key that a file has set.

        Yields:
            Nothing; the check of the merged config belongs into the ``with`` block.

        Raises:
            ValueError: The error of the check.
        """
        try:
            yield
        except ValueError as error:
            text = str(error)
            named = [key for key in self._places if key in text]
            if not named:
                raise
            # Of several keys the first one named; of A.B and A.B_C the longer one.
            first = min(named, key=lambda key: (text.find(key), -len(key)))
            raise ValueError(f"{self._places[first]}: {text}") from error

    # --- one key --------------------------------------------------------------------------

    def _merge(self, key: str, setting: Setting) -> None:
        cfg = self._cfg
        if cfg.key_is_deprecated(key):
            return
        if cfg.key_is_renamed(key):
            new = cfg.__dict__[cfg.RENAMED_KEYS][key]
            raise ValueError(f"{setting.place}: {key} is called {new} now")
        node, name = self._node(key, setting)
        if isinstance(node.get(name), Mapping):
            if setting.value is not None and not is_blank(setting.value):
                raise _group_refused(self._defaults, key, setting)
            return
        if setting.value is None:
            raise ValueError(f"{setting.place}: {key} is one value, not a group of keys")
        node[name] = self._read(key, setting.value, setting.place)
        self.given.add(key)

    def _node(self, key: str, setting: Setting) -> tuple[Any, str]:
        """Return the node of a key and the last part of its name."""
        node, parts = self._cfg, key.split(".")
        for number, part in enumerate(parts[:-1], start=1):
            node = node.get(part)
            if node is None:
                break
            if not isinstance(node, Mapping):
                parent = ".".join(parts[:number])
                raise ValueError(
                    f"{setting.place}: {parent} is one value, not a group of keys"
                )
        if node is None or (parts[-1] not in node and not node.is_new_allowed()):
            raise _unknown_key(key, setting.place, self._defaults)
        return node, parts[-1]

    def _kind(self, key: str) -> type | None:
        if key in self._options:
            return self._options[key][0].kind
        default = self._defaults.get(key)
        return None if default is None else type(default)

    def _read(self, key: str, raw: Raw, place: str) -> Any:
        options, default = self._options.get(key, []), self._defaults.get(key)
        if is_empty(raw) and (default is None or key in self._optional):
            return None
        special = {text for option in options for text in option.special_values}
        if isinstance(raw, Written) and raw.text in special:
            return raw.text
        try:
            return read_value(raw, self._kind(key), item=_item_kind(default))
        except RefusedValueError as refused:
            legal = describe_all(options) if options else _describe(default)
            raise ValueError(
                f"{place}: {key} must be {legal}, got {shown(raw)}{refused}"
            ) from refused


def read_option(option: Option, raw: Raw, label: str) -> Any:
    """Read and check the value of an option that a user wrote.

    Args:
        option: The option.
        raw: What was written.
        label: Name of the option for messages.

    Returns:
        The value in the option's type.

    Raises:
        ValueError: If the value has another type, or is outside the legal range.
    """
    if isinstance(raw, Written) and raw.text in option.special_values:
        return raw.text
    try:
        value = read_value(raw, option.kind)
    except RefusedValueError as refused:
        raise ValueError(
            f"{label} must be {option.describe()}, got {shown(raw)}{refused}"
        ) from refused
    return option.check(value, label=label)


def pairs_of(opts: Sequence[str]) -> list[tuple[str, str]]:
    """Split the ``KEY VALUE`` arguments of a command line into pairs.

    Args:
        opts: Words.

    Returns:
        Pairs of key and value.

    Raises:
        ValueError: If a value is missing, or an option of the command stands among them.
    """
    for word in opts[::2]:
        if word.startswith("--"):
            raise ValueError(
                f"{_COMMAND_LINE}: {word} must stand before the first KEY VALUE, which is "
                f"{opts[0]}"
                if word != opts[0]
                else f"{_COMMAND_LINE}: the command has no option {word}"
            )
    if len(opts) % 2:
        raise ValueError(f"{_COMMAND_LINE}: the key {opts[-1]} has no value: KEY VALUE")
    return list(zip(opts[::2], opts[1::2], strict=True))


def _item_kind(default: Any) -> type | None:
    """Return the type of the items of a list by its default; None if it leaves it open."""
    kinds = {type(item) for item in default} if isinstance(default, (list, tuple)) else ()
    if kinds and set(kinds) <= {int, float}:
        return float if float in kinds else int
    return str if kinds == {str} else None


def _describe(default: Any) -> str:
    kind = KINDS.get(type(default), "a value")
    if not isinstance(default, (list, tuple)):
        return kind
    item = _ITEMS.get(_item_kind(default), "")
    return f"{kind}{item}, such as {default}" if default else kind


def _group_refused(known: Iterable[str], key: str, setting: Setting) -> ValueError:
    example = next(name for name in known if name.startswith(f"{key}."))
    given, hint = setting.value, ""
    if isinstance(given, Written) and re.match(r"\w+:\S", given.text):
        hint = f"; {given.text!r} needs a space after its colon"
    return ValueError(
        f"{setting.place}: {key} is a group of keys: set one, such as {example}{hint}"
    )


def _unknown_key(key: str, place: str, known: Iterable[str]) -> ValueError:
    by_lower = {name.lower(): name for name in known}
    same = [key.lower()] if key.lower() in by_lower else []
    close = same or difflib.get_close_matches(key.lower(), by_lower, n=3, cutoff=0.6)
    close = [by_lower[name] for name in close]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    if key.isupper() and not same:  # FastReID's projects add keys
        hint += (
            " A key of your own needs --import FILE.py with its add_..._config(cfg)"
            if hint
            else "; a key of your own needs --import FILE.py with its add_..._config(cfg)"
        )
    return ValueError(f"unknown config key {key} in {place}{hint}")
