"""YAML files of keys and values: what is written where, without guessing types.

PyYAML parses the file but does not interpret it: by the rules of YAML 1.1, ``010`` is 8,
``1:30`` is 90, ``on`` is True and ``1e-3`` is text. The type of each value is that of its
key, see :mod:`selcon_plugin.values`.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from selcon_plugin.values import Raw, Written, read_value

__all__ = ["Entry", "Group", "read_settings", "read_yaml", "read_yaml_values"]

_MAX_VALUES = 20_000  # with all aliases resolved
_MAX_BYTES = 20_000_000
_MERGE = "<<"
_TEXT_TAG = "tag:yaml.org,2002:str"
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")}
_TAGS = {"seq": "tag:yaml.org,2002:seq", "map": "tag:yaml.org,2002:map"}
_BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass
class Group:
    """Keys and values that stand under one key, or at the top of a file.

    Attributes:
        entries: Entries by key.
    """

    entries: dict[str, Entry] = field(default_factory=dict)


@dataclass
class Entry:
    """One key of a file.

    Attributes:
        value: A value, or a group of keys.
        line: Line of the key, counted from 1.
    """

    value: Raw | Group
    line: int


class _Loader(yaml.SafeLoader):
    """Loader of nodes whose plain texts have no type."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]


def read_yaml(file: str | Path) -> Group:
    """Read a YAML file with keys at the top.

    Args:
        file: Path of the file: UTF-8, or UTF-16 with a byte-order mark.

    Returns:
        The keys with their values and lines. A key with dots, ``SOLVER.MAX_EPOCH``, is the
        same as the nested ones.

    Raises:
        ValueError: If the file is empty, is not YAML, holds several documents, or sets a
            key twice; the message names the file, the key and the line.
        FileNotFoundError: If there is no such file; the same for other ``OSError``.
    """  # noqa: DOC502  (raised by the functions called here)
    return _Reader(str(file)).read(Path(file).read_bytes())


def read_yaml_values(file: str | Path) -> dict[str, Any]:
    """Read a YAML file, such as a run has written, with each value in the type of its form.

    Args:
        file: Path of the file.

    Returns:
        Nested dicts of numbers, True, False, None, lists and texts.

    Raises:
        ValueError: As for :func:`read_yaml`.
        FileNotFoundError: As for :func:`read_yaml`.
    """  # noqa: DOC502  (raised by the functions called here)
    return _plain(read_yaml(file))


def read_settings(file: Path) -> dict[str, Any]:
    """Read settings as ``yaml.safe_dump`` has written them.

    Args:
        file: Path of the file.

    Returns:
        The settings; empty for an empty file.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: remove it to start over") from error
    if not isinstance(content, dict) and content is not None:
        raise ValueError(f"{file} is damaged: remove it to start over")
    return content or {}


def _plain(group: Group) -> dict[str, Any]:
    return {
        key: _plain(entry.value)
        if isinstance(entry.value, Group)
        else read_value(entry.value, None)
        for key, entry in group.entries.items()
    }


class _Reader:
    def __init__(self, file: str) -> None:
        self._file = file
        self._open: set[int] = set()  # nodes around the present one
        self._count = 0

    def read(self, data: bytes) -> Group:
        node = self._compose(data)
        if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
            raise ValueError(f"{self._file} is empty: it has no keys")
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(
                f"{self._file} is not a config: it must contain lines KEY: value, with a "
                "space after the colon"
            )
        try:
            return self._group(node)
        except RecursionError:
            raise ValueError(f"{self._file} is not a config: too deeply nested") from None

    def _error(self, line: int, text: str) -> ValueError:
        return ValueError(f"{self._file}, line {line}: {text}")

    def _compose(self, data: bytes) -> yaml.Node | None:
        text = self._decode(data)
        try:
            loader = _Loader(text)
            try:
                node: yaml.Node | None = loader.get_single_node()
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise self._error(line, f"this is not YAML: {_reason(error)}") from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            reason = f"the character {chr(error.character)!r} is not allowed"
            raise self._error(line, f"this is not YAML: {reason}") from error
        except RecursionError as error:
            raise ValueError(f"{self._file} is not YAML: too deeply nested") from error
        return node

    def _decode(self, data: bytes) -> str:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"{self._file} is not YAML: it has {len(data):,} bytes")
        encoding = "utf-16" if data.startswith(_BOMS[1:]) else "utf-8-sig"
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise self._error(
                line, "this is not YAML in UTF-8: save the file with this encoding"
            ) from error

    # --- nodes ----------------------------------------------------------------------------

    def _group(self, node: yaml.MappingNode) -> Group:
        self._check_tag(node, _TAGS["map"])
        group, merged = Group(), []
        seen: dict[str, int] = {}
        with _Inside(self, node):
            for key_node, value_node in node.value:
                key, line = self._key(key_node), key_node.start_mark.line + 1
                if key in seen and key != _MERGE:
                    raise self._twice(key, seen[key], line)
                seen[key] = line
                if key == _MERGE:
                    merged += self._merged(value_node)
                else:
                    self._put(group, key, Entry(self._value(value_node), line))
        for other in merged:
            _merge_missing(group, other)
        return group

    def _key(self, node: yaml.Node) -> str:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(line, "a key must be a name, not a list or a group")
        key: str = node.value.strip()
        if not all(part.strip() for part in key.split(".")):
            raise self._error(line, f"a key must be a name, got {key!r}")
        self._check_tag(node, _TEXT_TAG, *_PLAIN_TAGS)
        return key

    def _put(self, group: Group, key: str, entry: Entry, path: str = "") -> None:
        """Put an entry under its key, which may have dots or be nested."""
        name, dot, rest = key.partition(".")
        if dot:
            inner = Group()
            self._put(inner, rest, entry)
            entry = Entry(inner, entry.line)
        known = group.entries.setdefault(name, entry)
        if known is entry:
            return
        if not (isinstance(known.value, Group) and isinstance(entry.value, Group)):
            raise self._twice(path + key, known.line, entry.line)
        for inner_name, inner_entry in entry.value.entries.items():
            self._put(known.value, inner_name, inner_entry, f"{path}{name}.")

    def _twice(self, key: str, first: int, second: int) -> ValueError:
        return self._error(
            second, f"{key} is set a second time, after line {first}: leave one of them"
        )

    def _merged(self, node: yaml.Node) -> list[Group]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found = []
        for one in nodes:
            if not isinstance(one, yaml.MappingNode):
                raise self._error(
                    node.start_mark.line + 1, f"{_MERGE} must name a group of keys"
                )
            found.append(self._group(one))
        return found

    def _value(self, node: yaml.Node) -> Raw | Group:
        self._count += 1
        if self._count > _MAX_VALUES:
            raise self._error(node.start_mark.line + 1, f"more than {_MAX_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            return self._group(node)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, _TAGS["seq"])
            with _Inside(self, node):
                return [self._item(entry) for entry in node.value]
        assert isinstance(node, yaml.ScalarNode)
        return self._text(node)

    def _item(self, node: yaml.Node) -> Raw:
        value = self._value(node)
        if isinstance(value, Group):
            raise self._error(node.start_mark.line + 1, "a list cannot contain keys")
        return value

    def _text(self, node: yaml.ScalarNode) -> Written:
        self._check_tag(node, _TEXT_TAG, *_PLAIN_TAGS)
        text = node.value.removesuffix("\n") if node.style in ("|", ">") else node.value
        explicit = node.tag == _TEXT_TAG and node.style is None and self._has_tag(node)
        quoted = explicit or (node.style is not None and node.tag == _TEXT_TAG)
        return Written(text, quoted, node.start_mark.line + 1)

    def _has_tag(self, node: yaml.ScalarNode) -> bool:
        mark = node.start_mark
        return bool(mark.buffer and mark.buffer[mark.pointer] == "!")

    def _check_tag(self, node: yaml.Node, *allowed: str) -> None:
        if node.tag not in allowed:
            raise self._error(
                node.start_mark.line + 1,
                f"the tag {node.tag!r} is refused. A config contains plain values only: "
                "remove the tag",
            )


class _Inside:
    """Guard of a node against an alias that leads back into it."""

    def __init__(self, reader: _Reader, node: yaml.Node) -> None:
        self._reader, self._node = reader, node

    def __enter__(self) -> None:
        if id(self._node) in self._reader._open:
            line = self._node.start_mark.line + 1
            raise self._reader._error(line, "an alias (*) leads back to its own group")
        self._reader._open.add(id(self._node))

    def __exit__(self, *_: object) -> None:
        self._reader._open.discard(id(self._node))


def _merge_missing(group: Group, other: Group) -> None:
    """Add the entries of a merge key; the group's own come first."""
    for key, entry in other.entries.items():
        if key not in group.entries:
            group.entries[key] = entry


def _reason(error: yaml.MarkedYAMLError) -> str:
    reason = ", ".join(filter(None, (error.context, error.problem)))
    if "\\t" in reason:
        return f"{reason}; indent with spaces, not tabs"
    if "but found another document" in reason:
        return "it holds several documents; leave one, without lines ---"
    return reason
