r"""Names of files and cameras in messages, without control characters.

A file name may contain anything but a slash: escape sequences that a terminal obeys, line
breaks that fake a line of a log, marks that reverse the direction of text, and bytes that
are not UTF-8, which Python reads as lone surrogates and refuses to print.
"""

from __future__ import annotations

import os
import re
import unicodedata

# Several scripts and emoji are written with these joiners.
_JOINERS = "\u200c\u200d"
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, marks, surrogates, breaks
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(\\))")


def printable(name: object) -> str:
    r"""Return a name as it is shown in messages.

    Args:
        name: Path, or name of a camera.

    Returns:
        The name in which control characters, direction marks, line breaks and bytes that
        are not UTF-8 are written as ``\x1b``, ``\u202e`` or ``\udce9``.

    Example:
        >>> print(printable("a\x1b[2J.jpg"))
        a\x1b[2J.jpg
    """
    text = os.fsdecode(name) if isinstance(name, (bytes, os.PathLike)) else str(name)
    if text.isprintable():
        return text
    return "".join(_escaped(c) if _is_unseen(c) else c for c in text)


def escape(name: str) -> str:
    r"""Write a name such that it is printable and :func:`unescape` returns it exactly.

    Args:
        name: Any string, also one with lone surrogates.

    Returns:
        The name as by :func:`printable`, with each backslash doubled.
    """
    return printable(name.replace("\\", "\\\\"))


def unescape(text: str) -> str:
    r"""Return the name that :func:`escape` was given.

    Args:
        text: Result of :func:`escape`.

    Returns:
        The name.

    Example:
        >>> unescape(escape("a\\\\x\\n\\udce9")) == "a\\\\x\\n\\udce9"
        True
    """
    return _ESCAPE.sub(_character, text)


def _is_unseen(character: str) -> bool:
    return character not in _JOINERS and unicodedata.category(character) in _UNSEEN


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _character(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    return chr(int(code, 16)) if code else "\\"
