"""Errors of the surroundings of a run, which no argument or config can prevent."""

from __future__ import annotations


class ResourceError(RuntimeError):
    """Error of the network, a disk, a package or another process; it names the remedy."""
