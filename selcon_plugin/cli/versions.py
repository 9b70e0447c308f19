"""Versions for ``selcon --version``, without an import of what they belong to."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from selcon_plugin._version import __version__

_PACKAGES = ("torch", "torchvision", "fastreid", "torchreid")


def versions() -> str:
    """Return one line with the versions of this package, Python, torch and the hosts."""
    found = [f"{name} {_version_of(name)}" for name in _PACKAGES]
    return ", ".join(
        [f"selcon_plugin {__version__}", f"Python {platform.python_version()}", *found]
    )


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
