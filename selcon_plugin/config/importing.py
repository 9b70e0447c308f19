"""Import of a user's Python files, and what they add to the config of a host."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from selcon_plugin.compat import PREPARATIONS, HostMissingError, prepare_torchvision

__all__ = ["add_imported_keys", "import_files"]

_PACKAGE = "__init__.py"
# Names as in FastReID's projects: add_retri_config, add_face_cfg.
_ADDS_KEYS = re.compile(r"add_\w*(config|cfg)")
_IMPORTS = re.compile(r"^\s*(?:from|import)\s+(\w+)", re.MULTILINE)
# Modules by the path that was given.
_imported: dict[str, ModuleType] = {}
# Names of these modules: another file of such a name replaces it.
_names: set[str] = set()


def import_files(files: Sequence[str]) -> None:
    """Import Python files, each only once per process.

    Modules and packages beside a file can be imported by it, as by a script.

    Args:
        files: Paths of files, or of folders with an ``__init__.py``; the name of a file or
            folder is that of its module.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is not a Python file, or has the name of another module.
    """
    for file in files:
        path = Path(file).resolve()
        if (path / _PACKAGE).is_file():
            path /= _PACKAGE
        if not path.is_file():
            raise FileNotFoundError(f"--import {file!r} does not exist")
        if path.suffix != ".py":
            raise ValueError(
                f"--import {file!r} is not a Python file: its name must end in .py"
            )
        _imported[file] = _import(path)


def _import(path: Path) -> ModuleType:
    is_package = path.name == _PACKAGE
    name = path.parent.name if is_package else path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    _check_name(path, name)
    spec = importlib.util.spec_from_file_location(
        name,
        path,
        submodule_search_locations=[str(path.parent)] if is_package else None,
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    beside = str(path.parent.parent if is_package else path.parent)
    if beside not in sys.path:
        sys.path.append(beside)  # last, so that it hides no installed package
    _prepare(path)
    spec.loader.exec_module(module)
    _names.add(name)
    return module


def _check_name(path: Path, name: str) -> None:
    """Refuse a file that would replace a module on which others depend, such as random."""
    is_taken = name in sys.stdlib_module_names or name in sys.modules
    if not is_taken and name.isidentifier():
        found = importlib.util.find_spec(name)
        is_taken = found is not None and "-packages" in str(found.origin)
    if is_taken and name not in _names:
        raise ValueError(
            f"--import {str(path)!r} has the name of the Python module {name}, which it "
            "would replace: rename the file"
        )


def _prepare(path: Path) -> None:
    """Prepare what a file imports: torchvision for timm, and the hosts that it names."""
    prepare_torchvision()
    text = "\n".join(_sources(path, set()))
    for name, prepare in PREPARATIONS.items():
        if name in text:
            # Where it is missing, the error of the file's own import tells where.
            with contextlib.suppress(HostMissingError):
                prepare()


def _sources(path: Path, seen: set[Path]) -> Iterator[str]:
    """Read a file and the files beside it that it imports; all files of a package."""
    files = [*path.parent.rglob("*.py")] if path.name == _PACKAGE else [path]
    for file in files:
        if file in seen:
            continue
        seen.add(file)
        text = file.read_text(encoding="utf-8", errors="replace")
        yield text
        for name in {match[1] for match in _IMPORTS.finditer(text)}:
            for other in (path.parent / f"{name}.py", path.parent / name / _PACKAGE):
                if other.is_file():
                    yield from _sources(other, seen)


def add_imported_keys(cfg: Any) -> Any:
    """Add the config keys of the imported files, by their ``add_..._config(cfg)``.

    Args:
        cfg: Default config of a host, which is changed in place.

    Returns:
        The same config.

    Raises:
        ValueError: If a function fails; the message names it and its file.
    """
    called = set()
    for file, module in _imported.items():
        for name, function in [*vars(module).items()]:
            origin = str(getattr(function, "__module__", ""))
            if (
                not callable(function)
                or not _ADDS_KEYS.fullmatch(name)
                or origin.startswith(f"{__package__.partition('.')[0]}.")
                or id(function) in called
            ):
                continue
            called.add(id(function))
            try:
                function(cfg)
            except Exception as error:  # whatever a user's function raises
                raise ValueError(
                    f"--import {file!r}: {name}(cfg) fails: {type(error).__name__}: {error}"
                ) from error
    return cfg
