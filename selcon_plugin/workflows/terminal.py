"""Output lines and a status line on the terminal."""

from __future__ import annotations

import shutil
import sys

from selcon_plugin.io.names import printable
from selcon_plugin.io.streams import is_terminal

__all__ = ["echo", "show_status"]


def echo(text: str) -> None:
    """Print text, which replaces the status line if there is one."""
    show_status("")
    lines = [printable(line) for line in text.split("\n")]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def show_status(text: str) -> None:
    """Show a status line on the terminal until the next text replaces it."""
    if is_terminal(sys.stdout):
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write(f"\r\x1b[K{text[:width]}")
        sys.stdout.flush()
