"""The command line: one file per command; parse, call, print.

Nothing in the library imports from here, and nothing algorithmic belongs here.
"""

from selcon_plugin.cli.main import main

__all__ = ["main"]
