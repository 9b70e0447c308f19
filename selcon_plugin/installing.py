"""Commands that install what is missing, for error messages.

The package itself is on no registry, so that ``pip install 'selcon_plugin[export]'`` cannot
be the remedy for everyone. The commands name the packages of an extra instead, as the
metadata of this installation lists them: they work for a wheel and for a checkout.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

__all__ = ["install_command", "pip_install", "requirements_of"]

_PACKAGE = "selcon_plugin"
_REQUIREMENT = re.compile(r"([^;]+?)\s*;.*\bextra == ['\"]([\w-]+)['\"]")


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra.

    Args:
        extra: Name of an extra of this package, such as ``"export"``.

    Returns:
        A command for the running Python, on any system's command line.
    """
    packages = requirements_of(extra)
    if packages:
        return pip_install(*packages)
    # A checkout that is only on the path, or was installed before it had the extra.
    return pip_install(f"{Path(__file__).resolve().parents[1]}[{extra}]")


def requirements_of(extra: str) -> list[str]:
    """Return the requirements of an extra, such as ``onnx>=1.15``; none if it is unknown.

    Args:
        extra: Name of an extra of this package.
    """
    try:
        lines = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = filter(None, map(_REQUIREMENT.fullmatch, lines))
    # Metadata may write fastreid_deps for fastreid-deps.
    return [m[1] for m in found if m[2].replace("_", "-") == extra.replace("_", "-")]


def pip_install(*arguments: str) -> str:
    """Return a ``pip install`` command for the running Python.

    Args:
        *arguments: Requirements, paths and options of pip.
    """
    parts = [sys.executable or "python", "-m", "pip", "install", *arguments]
    # Double quotes mean the same to POSIX shells, PowerShell and Windows' cmd.
    return " ".join(part if _is_plain(part) else f'"{part}"' for part in parts)


def _is_plain(part: str) -> bool:
    return re.fullmatch(r"[\w./:\\=@+-]+", part) is not None
