"""Values that a person writes in a config file, on a command line or as an argument.

All of them are read by :func:`read_value`. The type of the option decides what a text
means: ``2024-01-31`` is the name of a folder but no number, ``5e-1`` is a number, and
``yes`` is True only for a switch. Nothing is guessed from the text itself.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Union

_WHOLE = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_PREFIXED = re.compile(r"[+-]?0(?:x[0-9a-f]+|o[0-7]+|b[01]+)", re.ASCII | re.IGNORECASE)
_DIGITS = r"\d+(?:_\d+)*"
_NUMBER = re.compile(
    rf"[+-]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:e[+-]?\d+)?",
    re.ASCII | re.IGNORECASE,
)
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_EMPTY = ("~", "null", "Null", "NULL", "None")
_OPENING = {"(": ")", "[": "]"}
_LARGEST = 2**63 - 1  # what tensors and files hold


@dataclass(frozen=True)
class Written:
    """A text as it was written, with its line.

    Attributes:
        text: The text without quotes.
        quoted: Whether it had quotes, so that it is no keyword such as ``null``.
        line: Line of the file, counted from 1; 0 on a command line.
    """

    text: str
    quoted: bool = False
    line: int = 0

    def __str__(self) -> str:
        return self.text


# A value of a file or a command line: a text, or a list of such values.
Raw = Union[Written, "list[Raw]"]


class RefusedValueError(ValueError):
    """Error for a text that is no value of the required type; the message adds a hint."""


def from_command_line(word: str) -> Written:
    """Return a word of a command line; one in quotes of its own loses them.

    Args:
        word: Word, after the shell has removed its quotes.

    Example:
        >>> from_command_line("'0001'")
        Written(text='0001', quoted=True, line=0)
    """
    text = word.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an escape that Python does not know
                found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError):
            return Written(word)
        return Written(found if isinstance(found, str) else word, quoted=True)
    return Written(word, quoted=not text)


def is_empty(raw: Raw) -> bool:
    """Return whether a value is null, which is written ``null``, ``~`` or ``None``."""
    return isinstance(raw, Written) and not raw.quoted and raw.text.strip() in _EMPTY


def is_blank(raw: Raw) -> bool:
    """Return whether nothing was written, as after a key that only ends with a colon."""
    return isinstance(raw, Written) and not raw.quoted and not raw.text.strip()


def written(value: Any) -> Raw:
    """Return how a Python value is written.

    Args:
        value: Number, True, False, None, text, path, or a list or tuple of these; NumPy's
            numbers as well.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> written([2.0])
        [Written(text='2.0', quoted=False, line=0)]
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, (str, PurePath)):
        return Written(str(value), quoted=True)
    if value is None or isinstance(value, (bool, int, float)):
        return Written(repr(value))
    if isinstance(value, (list, tuple)):
        return [written(entry) for entry in value]
    raise TypeError(f"{value!r} is no number, text or list")


def shown(raw: Raw, limit: int = 80) -> str:
    """Format a value for a message: with quotes, and shortened if it is long."""
    text = _joined(raw) if isinstance(raw, list) else repr(raw.text)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Format names for a message; a long list is shortened.

    Args:
        names: Names.
        limit: Largest number of names to list.

    Returns:
        The names, separated by commas.

    Example:
        >>> listed("abcdef", 4)
        'a, b, c, d and 2 others'
    """
    known = list(names)
    rest = len(known) - limit
    text = ", ".join(known[: limit if rest > 1 else None])
    return f"{text} and {rest} others" if rest > 1 else text


def _joined(raw: Raw) -> str:
    if isinstance(raw, list):
        return f"[{', '.join(map(_joined, raw))}]"
    return repr(raw.text) if raw.quoted else raw.text


def read_value(raw: Raw, kind: type | None, *, item: type | None = None) -> Any:
    """Read a value of a given type.

    Args:
        raw: What was written.
        kind: ``int``, ``float``, ``bool``, ``str``, ``list`` or ``tuple``; None for a value
            of any type, which is a number, True, False, None, a list or else text.
        item: Type of the items of a list; None for any.

    Returns:
        The value in its type.

    Raises:
        RefusedValueError: If the text is not a value of this type; the message is a hint,
            which may be empty.

    Example:
        >>> read_value(Written("010"), int), read_value(Written("1e-3"), float)
        (10, 0.001)
        >>> read_value(Written("010"), str)
        '010'
        >>> read_value(Written("(64, 32)"), tuple, item=int)
        (64, 32)
    """
    if kind in (list, tuple):
        items = [read_value(entry, item) for entry in _items(raw)]
        return items if kind is list else tuple(items)
    if kind is None:
        return _read_any(raw)
    if isinstance(raw, list):
        raise RefusedValueError("; it is a list")
    if kind is str:
        return _read_text(raw)
    text = raw.text.strip()
    if not text:
        raise RefusedValueError("; it is empty")
    if kind is bool:
        return _read_switch(text)
    return _read_whole(text) if kind is int else _read_number(text)


def _read_text(raw: Written) -> str:
    if is_empty(raw):
        raise RefusedValueError(
            f'; write "" for no text, or \'"{raw.text}"\' for this text'
        )
    if not (raw.text or raw.quoted):
        raise RefusedValueError('; write "" for no text')
    return raw.text


def _read_switch(text: str) -> bool:
    if text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    raise RefusedValueError("")


def _read_whole(text: str) -> int:
    if _PREFIXED.fullmatch(text):
        value = int(text, 0)
    elif _WHOLE.fullmatch(text) and len(text) <= 400:
        value = int(text)
    else:
        number = _read_number(text)
        if number != math.floor(number):
            raise RefusedValueError("")
        value = int(number)
    if abs(value) > _LARGEST:
        raise RefusedValueError("; it is too large")
    return value


def _read_number(text: str) -> float:
    if _PREFIXED.fullmatch(text):
        return float(_read_whole(text))
    if not _NUMBER.fullmatch(text):
        if re.fullmatch(r"[+-]?\d+,\d+", text):
            raise RefusedValueError("; write it with a decimal point")
        raise RefusedValueError(_not_finite(text))
    value = float(text)
    if not math.isfinite(value):
        raise RefusedValueError("; it must be finite")
    return value


def _not_finite(text: str) -> str:
    names = ("inf", "infinity", "nan")
    return "; it must be finite" if text.lower().lstrip("+-.") in names else ""


def _read_any(raw: Raw) -> Any:
    """Read a value of an unknown type by its form."""
    if isinstance(raw, list):
        return [_read_any(entry) for entry in raw]
    text = raw.text.strip()
    if raw.quoted:
        return raw.text
    if is_empty(raw) or not text:
        return None
    if text[0] in _OPENING:
        entries = [_read_any(entry) for entry in _items(raw)]
        return entries if text[0] == "[" else tuple(entries)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text) or _PREFIXED.fullmatch(text):
        return _read_whole(text)
    return _read_number(text) if _NUMBER.fullmatch(text) else text


# --- lists --------------------------------------------------------------------------------


def _items(raw: Raw) -> Sequence[Raw]:
    """Return the items of a list that was written as such, or as text."""
    if isinstance(raw, list):
        return raw
    text = raw.text.strip()
    bracketed = text[:1] in _OPENING and text
    if not bracketed and "," not in text:
        single = text and not is_empty(raw)
        raise RefusedValueError(f"; for a list of one write [{text}]" if single else "")
    parser = _ListParser(text if bracketed else f"[{text}]", raw.line)
    return parser.parse()


class _ListParser:
    """Parser of lists in the syntax of Python or YAML, which keeps the texts of the items.

    Args:
        text: A list with its brackets; the last item may be followed by a comma.
        line: Line of the file.
    """

    _TOKEN = re.compile(
        r"\s*(?:(?P<sign>[()\[\],])|(?P<quoted>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
        r"|(?P<word>[^()\[\],'\"]+))",
        re.DOTALL,
    )
    _DEPTH = 20

    def __init__(self, text: str, line: int) -> None:
        self._text, self._line, self._at = text, line, 0

    def parse(self) -> list[Raw]:
        found = self._list(self._next(), 0)
        if self._text[self._at :].strip():
            raise RefusedValueError("; there is text after the list")
        return found

    def _next(self) -> str:
        match = self._TOKEN.match(self._text, self._at)
        if match is None:
            raise RefusedValueError("; a bracket or a quote is not closed")
        self._at = match.end()
        return match[match.lastgroup or 0].strip()

    def _list(self, opening: str, depth: int) -> list[Raw]:
        if depth > self._DEPTH:
            raise RefusedValueError("; it is nested too deeply")
        items: list[Raw] = []
        token = self._next()
        while token != _OPENING[opening]:
            items.append(self._item(token, depth))
            token = self._next()
            if token == ",":
                token = self._next()
            elif token != _OPENING[opening]:
                raise RefusedValueError("; a comma or a bracket is missing")
        return items

    def _item(self, token: str, depth: int) -> Raw:
        if token in _OPENING:
            return self._list(token, depth + 1)
        if token in (",", ")", "]"):
            raise RefusedValueError("; an item is missing")
        if token[0] in "'\"":
            word = from_command_line(token)
            return Written(word.text, True, self._line)
        return Written(token, False, self._line)
