"""Configs that record which of their keys are read, to name those without effect."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from selcon_plugin.config.checks import flatten_config

_ATTRIBUTE = "_selcon_reads"  # of a node, which is not one of its keys


class ReadKeys:
    """Full keys that were read; all copies of a config share one.

    Attributes:
        keys: The keys.
        paused: Whether reading a key is not recorded at present.
    """

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.paused = False

    def __deepcopy__(self, _memo: dict[int, Any]) -> ReadKeys:
        return self


def record_reads(cfg: Any) -> Any:
    """Return a copy of a config that records which of its keys are read.

    Its whole content, as for a log or a file, is not recorded as read.

    Args:
        cfg: Config of a host, a tree of nodes of one class of yacs.

    Returns:
        The copy; copies of it share the record.
    """
    copied = cfg.clone()
    _attach(copied, "", ReadKeys())
    return copied


def reads_of(cfg: Any) -> ReadKeys:
    """Return the record of a config; an empty one if it records nothing."""
    found = cfg.__dict__.get(_ATTRIBUTE)
    return found[0] if found else ReadKeys()


@contextlib.contextmanager
def unrecorded(cfg: Any) -> Iterator[None]:
    """Read keys without a record inside the ``with`` block, for a check of all keys."""
    reads = reads_of(cfg)
    before, reads.paused = reads.paused, True
    try:
        yield
    finally:
        reads.paused = before


def unread_keys(
    cfg: Any, defaults: Mapping[str, Any], late: Collection[str] = ()
) -> list[str]:
    """List the keys whose values differ from the defaults and that nothing has read.

    Args:
        cfg: Config that records.
        defaults: Default by full key.
        late: Starts of keys that are read later.

    Returns:
        Full keys in the order of the config.
    """
    read = reads_of(cfg).keys
    return [
        key
        for key in changed_keys(cfg, defaults)
        if key not in read and not key.startswith(tuple(late))
    ]


def changed_keys(cfg: Any, defaults: Mapping[str, Any]) -> list[str]:
    """List the keys whose values differ from the defaults.

    Args:
        cfg: Config of a host.
        defaults: Default by full key.

    Returns:
        Full keys in the order of the config.
    """
    return [
        key
        for key, value in flatten_config(cfg).items()
        if key in defaults and _plain(value) != _plain(defaults[key])
    ]


def disabled_keys(cfg: Any, keys: Collection[str], switch: str = "ENABLED") -> list[str]:
    """Return those of some keys whose node is switched off.

    Args:
        cfg: Config of a host.
        keys: Full keys.
        switch: Name of the key that switches a node on.

    Returns:
        The keys.
    """
    flat = flatten_config(cfg)
    return [key for key in keys if flat.get(f"{key.rpartition('.')[0]}.{switch}") is False]


def _attach(node: Any, prefix: str, reads: ReadKeys) -> None:
    for name, value in node.items():
        if isinstance(value, type(node)):
            _attach(value, f"{prefix}{name}.", reads)
    # yacs takes every other assignment for one of a key.
    kind: Any = type(node)
    object.__setattr__(node, "__class__", _recording(kind))
    node.__dict__[_ATTRIBUTE] = (reads, prefix)


@functools.cache
def _recording(kind: Any) -> Any:
    """Return a subclass of a class of nodes that records reads."""
    if hasattr(kind, "_records"):
        return kind

    class RecordingNode(kind):  # type: ignore[misc]
        _records = True

        def __getitem__(self, key: str) -> Any:
            value = super().__getitem__(key)
            reads, prefix = self.__dict__.get(_ATTRIBUTE, (None, ""))
            if reads is not None and not reads.paused and not isinstance(value, Mapping):
                reads.keys.add(prefix + key)
            return value

        def get(self, key: str, default: Any = None) -> Any:
            if key not in self:
                return default
            return self[key]

    RecordingNode.__name__ = kind.__name__
    return RecordingNode


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
