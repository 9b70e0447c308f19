"""The command line, with one module per command.

A command parses its arguments, calls the library and prints the result. Algorithms do not
belong here, and no other part of the package imports from here.
"""

from selcon_plugin.cli.main import main

__all__ = ["main"]
