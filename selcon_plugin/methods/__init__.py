"""Training methods, one file per method; every file in this folder is registered."""

import importlib
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

__all__ = [
    "Method",
    "build_method",
    "method_class",
    "method_names",
    "method_options",
    "register_method",
]
