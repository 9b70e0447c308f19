"""Output lines and a status line on the terminal."""

from __future__ import annotations

import shutil
import sys

__all__ = ["echo", "show_status"]


def echo(text: str) -> None:
    """Print text, which replaces the status line if there is one."""
    show_status("")
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show_status(text: str) -> None:
    """Show a status line on a terminal until the next text replaces it."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write(f"\r\x1b[K{text[:width]}")
        sys.stdout.flush()
