"""Registry of entries that users select by name: methods, labelers and planners."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Entry = TypeVar("Entry")
Registered = TypeVar("Registered")


class Registry(dict[str, Entry]):
    """Dictionary of entries by name, with errors that list the known names.

    Args:
        kind: Kind of the entries in error messages, for instance ``"method"``.

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
        """Create a decorator that registers its argument.

        Args:
            name: Unused name; the decorator raises a ValueError for a name in use.

        Returns:
            The decorator, which returns its argument.
        """

        def decorate(entry: Registered) -> Registered:
            if name in self:
                raise ValueError(f"a {self.kind} named {name!r} is already registered")
            self[name] = entry  # type: ignore[assignment]
            return entry

        return decorate

    def names(self) -> list[str]:
        """Return the registered names in alphabetical order."""
        return sorted(self)

    def __missing__(self, name: str) -> Entry:
        raise ValueError(
            f"unknown {self.kind} {name!r}; known are {', '.join(self.names())}"
        )
