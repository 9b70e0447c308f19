"""Names for what users choose by name: methods, labelers, samplers' planners."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Entry = TypeVar("Entry")
Registered = TypeVar("Registered")


class Registry(dict[str, Entry]):
    """Entries by name; an unknown name says which are known.

    Args:
        kind: What an entry is called in an error, for instance ``"method"``.

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register("round")
        ... class Ball: ...
        >>> shapes["square"]
        Traceback (most recent call last):
        ValueError: unknown shape 'square'; known are round
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Make a decorator that registers what it decorates.

        Args:
            name: A name that is not taken; another is a ValueError.

        Returns:
            The decorator; it returns its argument.
        """

        def decorate(entry: Registered) -> Registered:
            if name in self:
                raise ValueError(f"a {self.kind} named {name!r} is already registered")
            self[name] = entry  # type: ignore[assignment]
            return entry

        return decorate

    def names(self) -> list[str]:
        """Return the registered names in order."""
        return sorted(self)

    def __missing__(self, name: str) -> Entry:
        raise ValueError(
            f"unknown {self.kind} {name!r}; known are {', '.join(self.names())}"
        )
