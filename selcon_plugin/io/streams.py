"""Standard streams, which a script may have replaced by any object with ``write``."""

from __future__ import annotations

from typing import Any


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; False for one that cannot tell.

    torchreid's scripts replace ``sys.stdout`` by an object with only ``write`` and
    ``flush``; without a console ``sys.stdout`` is None; a closed stream raises ValueError.

    Args:
        stream: A file-like object, or None.
    """
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False
