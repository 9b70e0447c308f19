"""Module names of version 0.1: importing one gives the module that took its place.

Each import warns with a DeprecationWarning that names the new module. The aliases are
removed in version 0.3.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

# Old name -> new modules. Where a module was split, its names are looked up in that order.
MOVED: dict[str, tuple[str, ...]] = {
    "adapt": ("workflows.adapt",),
    "api": ("workflows.fit",),
    "backbones": ("models.backbone", "models.timm", "models.feature_map"),
    "bench": ("workflows.bench",),
    "camera_entropy": ("losses.camera_weights",),
    "camera_proxies": ("memory.camera_proxy",),
    "collapse": ("metrics.collapse",),
    "demo": ("workflows.demo",),
    "diagnostics": ("metrics.identities",),
    "doctor": ("cli.doctor",),
    "ema": ("models.ema",),
    "embedder": ("inference.embedder", "inference.folder_features"),
    "estimates": ("engine.estimates",),
    "exporting": ("inference.export",),
    "folder_clusters": ("workflows.folder_clusters",),
    "imagenet_weights": ("models.pretrained",),
    "label_free": ("metrics.label_free",),
    "normalization": ("models.ghost_norm",),
    "onnx_network": ("inference.onnx",),
    "own_folder": ("workflows.cluster_folder",),
    "safe_loading": ("io.safe_loading",),
    "visualize": ("report.sheets", "runs.ranked", "runs.metrics"),
    "wave_block": ("models.wave_block",),
    "clustering.engine": ("clustering.labeling",),
    "datasets.synthetic_persons": ("datasets.synthetic.persons",),
    "engine.settings": ("config.keys", "samplers.cluster"),
    "engine.checks": ("config.checks",),
    "torchreid_ext.backbones": ("models.torchreid",),
}
# Old package -> new package with modules of the same names.
MOVED_PACKAGES = {"commands": "cli"}
_PACKAGE = __name__.rpartition(".")[0]


def _new_names(old: str) -> tuple[str, ...]:
    """Return the modules that took the place of an old one; empty if it is none."""
    package, dot, module = old.partition(".")
    if package in MOVED_PACKAGES:
        new = f"{MOVED_PACKAGES[package]}{dot}{module}"
        return (new,) if importlib.util.find_spec(f"{_PACKAGE}.{new}") else ()
    return MOVED.get(old, ())


class _MovedModule(types.ModuleType):
    """A module whose names are those of the modules that took its place."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for new in _new_names(self.__name__.removeprefix(f"{_PACKAGE}.")):
                module = importlib.import_module(f"{_PACKAGE}.{new}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or not _new_names(name):
            return None
        is_package = name in MOVED_PACKAGES
        return importlib.util.spec_from_loader(fullname, self, is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__.removeprefix(f"{_PACKAGE}.")
        new = " and ".join(f"{_PACKAGE}.{name}" for name in _new_names(old))
        warnings.warn(
            f"{module.__name__} has moved: import from {new}",
            DeprecationWarning,
            stacklevel=2,
        )


def install() -> None:
    """Let the old names be imported; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
