"""Parser of the commands' arguments: each mistake is one line that names the remedy."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from selcon_plugin.config.files import check_config_file, find_config_file
from selcon_plugin.options import Interval
from selcon_plugin.values import RefusedValueError, from_command_line, read_value

_CHOICE = re.compile(r"^argument (.*): invalid choice: '?(.*?)'? \(choose from (.*)\)$")


class CommandParser(argparse.ArgumentParser):
    """Parser that raises ``ValueError``, and refuses an option with two values.

    Args:
        prog: Name of the command, ``selcon train``.
        **kwargs: As for ``argparse.ArgumentParser``.
    """

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog=prog, **kwargs)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)
        self.given: dict[str, Any] = {}  # values of the present call, by destination

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, see ``argparse``."""
        self.given = {}
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise an error with the closest valid option or value.

        Args:
            message: Message of ``argparse``.

        Raises:
            ValueError: Always.
        """
        text = re.sub(
            r"^argument (.+?): (?:it (?=is |must )|(?='))",
            r"\1 ",
            self._with_hint(message),
        )
        raise ValueError(
            f"{text}{'' if text.endswith('?') else ';'} see {self.prog} --help"
        )

    def _with_hint(self, message: str) -> str:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            unknown_ones = unknown.split()
            option = next((o for o in unknown_ones if o[0] == "-"), unknown_ones[0])
            return f"there is no option {option}{self._closest(option)}"
        choice = _CHOICE.match(message)
        if choice:
            option, value, legal = choice.groups()
            return f"{option} must be one of {legal}, got {value!r}{closest(value, legal)}"
        return message

    def _closest(self, option: str) -> str:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        name = option.partition("=")[0].replace("_", "-").lower()
        return _did_you_mean(difflib.get_close_matches(name, known, n=1, cutoff=0.6))


class _StoreOnce(argparse.Action):
    """Storing of a value; a second, other value for the same option is refused."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, CommandParser)
        known = parser.given.setdefault(self.dest, values)
        if option_string and known != values:
            raise argparse.ArgumentError(
                self, f"it is given twice, {known!r} and {values!r}: leave one of them"
            )
        setattr(namespace, self.dest, values)


def closest(value: str, legal: str) -> str:
    """Return a hint with the legal value that is most similar.

    Args:
        value: Value that was given.
        legal: Legal values, separated by commas.
    """
    names = [word.strip(" '") for word in legal.split(",")]
    return _did_you_mean(difflib.get_close_matches(value, names, n=1, cutoff=0.6))


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {names[0]}?" if names else ""


def whole_number(low: int | None = None) -> Callable[[str], int]:
    """Return a type of arguments: a whole number, at least ``low``."""
    return _number_type(int, "a whole number", None if low is None else Interval(low))


def number(legal: Interval) -> Callable[[str], float]:
    """Return a type of arguments: a finite number in a range."""
    return _number_type(float, "a number", legal)


def number_or_range(legal: Interval) -> Callable[[str], float]:
    """Return a type of arguments: a number, or a range ``LOW-HIGH`` for its middle.

    Args:
        legal: Legal numbers, which are positive.

    Returns:
        A function that returns the number, or the geometric mean of the range.

    Example:
        >>> number_or_range(Interval(1))("2-8")
        4.0
    """
    read = number(legal)

    def read_middle(text: str) -> float:
        low, dash, high = text.partition("-")
        if not (low.strip() and dash):
            return read(text)
        ends = read(low), read(high)
        if ends[0] > ends[1]:
            raise argparse.ArgumentTypeError(
                f"it must be a range from the smaller to the larger number, got {text!r}"
            )
        return math.sqrt(ends[0] * ends[1])

    return read_middle


def _number_type(kind: type, name: str, legal: Interval | None) -> Callable[[str], Any]:
    described = f"{name} {legal}" if legal else name

    def read(text: str) -> Any:
        try:
            value = read_value(from_command_line(text), kind)
        except RefusedValueError as error:
            raise argparse.ArgumentTypeError(
                f"it must be {described}, got {text!r}{error}"
            ) from error
        if legal is not None and not legal.contains(value):
            raise argparse.ArgumentTypeError(f"it must be {described}, got {value}")
        return value

    return read


def config_file(text: str) -> str:
    """Return the path of a config: a file, or one of the package by its name."""
    file = find_config_file(text)
    if not file:
        return file
    try:
        check_config_file(file, "")
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return file
