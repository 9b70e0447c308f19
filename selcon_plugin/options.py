"""Settings of a method, read from its constructor: defaults, types and legal ranges.

A method states each option once, in its signature::

    def __init__(self, ..., *, temperature: Annotated[float, Interval(0, above=True)] = 0.1)

From there come the constructor's default, the config key (``TEMPERATURE``), its check and
the error that names key, value and legal range.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Interval:
    """Legal range of a number.

    Attributes:
        low: Smallest legal value; itself legal unless ``above``.
        high: Largest legal value, None for no limit.
        above: Whether ``low`` itself is excluded.
    """

    low: float
    high: float | None = None
    above: bool = False

    def contains(self, value: float) -> bool:
        """Tell whether ``value`` is legal; NaN is not."""
        from_low = value > self.low if self.above else value >= self.low
        return from_low and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        sign = ">" if self.above else ">="
        if self.high is None:
            return f"{sign} {self.low:g}"
        return f"{sign} {self.low:g} and <= {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """Legal values of a word."""

    values: tuple[str, ...]

    def contains(self, value: str) -> bool:
        """Tell whether ``value`` is one of the words."""
        return value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(value) for value in self.values)


@dataclass(frozen=True)
class Option:
    """One setting of a method.

    Attributes:
        name: Constructor argument.
        default: Its default.
        kind: ``int``, ``float``, ``bool`` or ``str``.
        legal: Range or choice; None if every value of the type is legal.
    """

    name: str
    default: Any
    kind: type
    legal: Interval | Choice | None

    def check(self, value: Any, *, label: str | None = None) -> Any:
        """Return ``value`` in the option's type, or say what would be legal.

        Args:
            value: What the user wrote.
            label: Name of the setting in the error, for instance the config key.

        Returns:
            The value; whole numbers are widened to float where the option is a float.

        Raises:
            ValueError: If type or range do not fit; names setting, value and legal range.
        """
        label = label or self.name
        right_type = isinstance(value, self.kind) and not (
            isinstance(value, bool) and self.kind is not bool
        )
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value, right_type = float(value), True
        if not right_type:
            raise ValueError(f"{label} must be {self.describe()}, got {value!r}")
        if self.legal is not None and not self.legal.contains(value):
            raise ValueError(f"{label} must be {self.describe()}, got {value!r}")
        return value

    def describe(self) -> str:
        """Say in words what is legal."""
        words = {
            int: "a whole number",
            float: "a number",
            bool: "True or False",
            str: "text",
        }
        kind = words[self.kind]
        return kind if self.legal is None else f"{kind} {self.legal}"


def options_of(constructor: Callable[..., Any]) -> dict[str, Option]:
    """Read the keyword-only options of a class or function.

    Args:
        constructor: A class, or a function; options are its keyword-only arguments.

    Returns:
        Options by name, in the order of the signature.
    """
    function = constructor.__init__ if inspect.isclass(constructor) else constructor
    hints = get_type_hints(function, include_extras=True)
    options = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints[parameter.name]
        legal = None
        if get_origin(hint) is Annotated:
            hint, legal = get_args(hint)[:2]
        options[parameter.name] = Option(parameter.name, parameter.default, hint, legal)
    return options


def check_options(
    options: Mapping[str, Option], values: Mapping[str, Any], *, owner: str
) -> dict[str, Any]:
    """Check values against options.

    Args:
        options: What ``owner`` understands.
        values: What the user set.
        owner: Name in the error for an unknown option.

    Returns:
        The values in the options' types.

    Raises:
        ValueError: If a name is unknown or a value illegal.
    """
    unknown = sorted(set(values) - set(options))
    if unknown:
        raise ValueError(
            f"{owner} has no option {', '.join(unknown)}; it has {', '.join(options)}"
        )
    return {name: options[name].check(value) for name, value in values.items()}
