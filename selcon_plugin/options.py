"""Declaration of options: name, default, type, legal range and meaning in one place.

A method declares its options in its constructor's signature, a run in the fields of a
dataclass::

    def __init__(self, ..., *, temperature: Annotated[float, Interval(0, above=True)] = 0.1)

The declaration provides the default, the config key (``TEMPERATURE``), its check and the
error with key, value and legal range; the docstring provides the meaning.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from selcon_plugin.values import listed

KINDS: dict[type, str] = {  # descriptions of the types of config values
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    list: "a list",
    tuple: "a list",
}
_SECTION = r"^{name}:\n((?:[ ]{{4}}.*(?:\n|$)|\n)+)"
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")  # :class:`~package.module.Name`
_LITERAL = re.compile(r'``"?([^`"]+)"?``')


@dataclass(frozen=True)
class Interval:
    """Legal range of a number.

    Attributes:
        low: Smallest legal value; itself legal unless ``above``.
        high: Largest legal value, None for no limit.
        above: Whether ``low`` itself is excluded.
        below: Whether ``high`` itself is excluded.
    """

    low: float
    high: float | None = None
    above: bool = False
    below: bool = False

    def contains(self, value: float) -> bool:
        """Return whether ``value`` is legal; NaN is not."""
        from_low = value > self.low if self.above else value >= self.low
        if self.high is None:
            return from_low
        return from_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'>' if self.above else '>='} {_exact(self.low)}"
        if self.high is None:
            return low
        return f"{low} and {'<' if self.below else '<='} {_exact(self.high)}"


def _exact(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


@dataclass(frozen=True)
class Choice:
    """Legal values of a string option."""

    values: tuple[str, ...]

    def contains(self, value: str) -> bool:
        """Return whether ``value`` is one of the legal values."""
        return value in self.values

    def closest(self, value: str) -> str:
        """Return a hint with the most similar legal value; ``""`` if none is similar."""
        by_lower = {word.lower(): word for word in self.values}
        close = difflib.get_close_matches(value.lower(), by_lower, n=1)
        return f": did you mean {by_lower[close[0]]!r}?" if close else ""

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(value) for value in self.values)


@dataclass(frozen=True)
class ChoiceOf:
    """Legal values that are determined when the options are read, not when declared.

    A script may register its own method after the import.

    Attributes:
        names: Function that returns the legal values.
    """

    names: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Option:
    """Option of a method, a labeler, a run or a host.

    Attributes:
        name: Constructor argument, or field of a dataclass.
        default: Default value.
        kind: Type of the value: ``int``, ``float``, ``bool``, ``str`` or ``list``.
        legal: Range or choice; None if every value of the type is legal.
        special_values: Strings that are also legal, such as "auto".
        meaning: Description in Markdown, without a full stop.
    """

    name: str
    default: Any
    kind: type
    legal: Interval | Choice | None
    special_values: tuple[str, ...] = ()
    meaning: str = field(default="", compare=False)

    def check(self, value: Any, *, label: str | None = None) -> Any:
        """Return ``value`` in the option's type, or raise an error with the legal range.

        Args:
            value: Value set by the user.
            label: Name of the option in the error, for instance the config key.

        Returns:
            The value; integers are converted to float if the option is a float.

        Raises:
            ValueError: If type or range do not match; the message holds the option, the
                value and the legal range.
        """
        label = label or self.name
        if isinstance(value, str) and value in self.special_values:
            return value
        right_type = isinstance(value, self.kind) and not (
            isinstance(value, bool) and self.kind is not bool
        )
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value, right_type = float(value), True
        if not right_type:
            raise ValueError(f"{label} must be {self.describe()}, got {value!r}")
        if self.legal is not None and not self.legal.contains(value):
            hint = self.legal.closest(value) if isinstance(self.legal, Choice) else ""
            raise ValueError(f"{label} must be {self.describe()}, got {value!r}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{label} must be {self.describe()}, finite, got {value!r}")
        return value

    def describe(self) -> str:
        """Return a description of the legal values."""
        kind = KINDS[self.kind]
        legal = kind if self.legal is None else f"{kind} {self.legal}"
        return " or ".join([legal, *map(repr, self.special_values)])

    def describe_legal(self) -> str:
        """Return the legal values in short form for tables: ``>= 0``, ``a, b``."""
        if self.kind is bool:
            return "True, False"
        if isinstance(self.legal, Choice):
            return ", ".join(self.legal.values)
        if self.legal is None:
            return self.describe()
        return " or ".join([str(self.legal), *self.special_values])


def options_of(constructor: Callable[..., Any]) -> dict[str, Option]:
    """Read the options of a dataclass, or the keyword-only arguments of a constructor.

    A class whose constructor takes ``**options`` passes them to its base class, so it also
    has the options of the base class.

    Args:
        constructor: Dataclass whose fields are options, or another class or a function
            whose keyword-only arguments are options.

    Returns:
        Options by name, in the order of the signature, a class's own before its base's.
    """
    if dataclasses.is_dataclass(constructor):
        meanings = described_names(constructor.__doc__, "Attributes")
        return _with_meanings(_options_of_fields(constructor), meanings)
    if not inspect.isclass(constructor):
        meanings = described_names(constructor.__doc__)
        return _with_meanings(_options_of_function(constructor), meanings)
    options: dict[str, Option] = {}
    meanings = {}
    for cls in constructor.__mro__:
        meanings = described_names(cls.__doc__) | meanings
        if "__init__" not in vars(cls):
            continue
        function = vars(cls)["__init__"]
        options = options | {
            name: option
            for name, option in _options_of_function(function).items()
            if name not in options
        }
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return _with_meanings(options, meanings)


def option_table(
    rows: Mapping[str, tuple[Any, Interval | Choice | None, str]],
) -> tuple[Option, ...]:
    """Create options from rows, for keys that are neither arguments nor fields.

    Args:
        rows: Default (which also gives the type), legal range and meaning by name.

    Returns:
        The options.

    Example:
        >>> option_table({"train.lr": (0.1, Interval(0), "learning rate")})[0].describe()
        'a number >= 0'
    """
    return tuple(
        Option(name, default, type(default), legal, meaning=meaning)
        for name, (default, legal, meaning) in rows.items()
    )


def _with_meanings(
    options: Mapping[str, Option], meanings: Mapping[str, str]
) -> dict[str, Option]:
    return {
        name: replace(option, meaning=meanings.get(name, ""))
        for name, option in options.items()
    }


def described_names(docstring: str | None, section: str = "Args") -> dict[str, str]:
    r"""Parse the descriptions of arguments, or attributes, from a docstring.

    Args:
        docstring: Docstring in Google style, or None.
        section: Heading of the section.

    Returns:
        Descriptions by name, in Markdown, starting with a lowercase letter and without a
        full stop at the end.

    Example:
        >>> described_names("Draw.\n\nArgs:\n    form: Either ``\"a\"`` or ``\"b\"``.")
        {'form': 'either `a` or `b`'}
    """
    text = inspect.cleandoc(docstring or "")
    found = re.search(_SECTION.format(name=section), text, re.MULTILINE)
    entries = _ENTRY.findall(found[1]) if found else []
    return {name: _as_markdown(description) for name, description in entries}


def _as_markdown(description: str) -> str:
    text = " ".join(description.split()).removesuffix(".")
    text = _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", text))
    # "K, neighbors ..." starts with a symbol, "SpCL's criterion" with a name.
    first = text.partition(" ")[0]
    is_word = first[:1].isupper() and first[1:].islower()
    return text[:1].lower() + text[1:] if is_word else text


def _options_of_function(function: Callable[..., Any]) -> dict[str, Option]:
    hints = get_type_hints(function, include_extras=True)
    options = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints[parameter.name]
        options[parameter.name] = _option(parameter.name, parameter.default, hint)
    return options


def _options_of_fields(cls: Any) -> dict[str, Option]:
    hints = get_type_hints(cls, include_extras=True)
    options = {}
    for entry in dataclasses.fields(cls):
        default = entry.default
        if default is dataclasses.MISSING:
            assert entry.default_factory is not dataclasses.MISSING
            default = entry.default_factory()
        options[entry.name] = _option(entry.name, default, hints[entry.name])
    return options


def _option(name: str, default: Any, hint: Any) -> Option:
    legal = None
    if get_origin(hint) is Annotated:
        hint, legal = get_args(hint)[:2]
    if isinstance(legal, ChoiceOf):
        legal = Choice(tuple(legal.names()))
    kind, special_values = _split_special_values(hint)
    return Option(name, default, kind, legal, special_values)


def _split_special_values(hint: Any) -> tuple[type, tuple[str, ...]]:
    """Split ``float | Literal["auto"]`` into its type and its special values."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, ()
    kind, literal = get_args(hint)
    return kind, get_args(literal)


def check_options(
    options: Mapping[str, Option], values: Mapping[str, Any], *, owner: str
) -> dict[str, Any]:
    """Check values against options.

    Args:
        options: Options of ``owner``.
        values: Values set by the user.
        owner: Name in the error for an unknown option.

    Returns:
        The values in the options' types.

    Raises:
        ValueError: If a name is unknown or a value illegal.
    """
    unknown = sorted(set(values) - set(options))
    if unknown:
        raise ValueError(
            f"{owner} has no option {', '.join(unknown)}; it has {listed(options)}"
        )
    return {name: options[name].check(value) for name, value in values.items()}
