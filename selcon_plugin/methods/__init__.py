"""Training methods, one file per method; every file in this folder is registered.

An installed package adds methods by an entry point of the group ``selcon_plugin.methods``
that names the module to import. No config key and no host belongs here.
"""

import importlib
import importlib.metadata
import pkgutil

from selcon_plugin.methods.base import (
    Method,
    build_method,
    method_class,
    method_names,
    method_options,
    register_method,
)

# Importing a method's file registers it: a new method needs no change in another file.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

for _entry in importlib.metadata.entry_points(group=__name__):
    try:
        _entry.load()
    except Exception as error:
        raise ImportError(
            f"the entry point {_entry.name} = {_entry.value} of the group {__name__}, "
            f"installed by {_entry.dist.name if _entry.dist else 'an unknown package'}, "
            f"fails: {type(error).__name__}: {error}. Repair or uninstall that package"
        ) from error

__all__ = [
    "Method",
    "build_method",
    "method_class",
    "method_names",
    "method_options",
    "register_method",
]
