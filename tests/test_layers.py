"""The layers of the package: imports point down, in no circle; each host has its folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import selcon_plugin

PACKAGE = Path(selcon_plugin.__file__).parent

# From top to bottom. Modules of one layer may not import each other, unless they are of the
# same folder.
LAYERS = (
    ("__main__",),
    ("__init__",),
    ("cli",),
    ("workflows",),
    ("retrieval",),
    ("inference",),
    ("hosts",),
    ("fastreid_ext", "torchreid_ext"),
    ("report",),
    ("config",),
    ("engine",),
    ("runs",),
    ("methods",),
    ("metrics", "models"),
    ("losses", "clustering"),
    ("compat",),
    ("datasets", "samplers"),
    ("features", "distance", "selection", "memory"),
    ("registry",),
    ("distributed", "options", "renamed", "io", "installing", "_version", "_moved"),
    ("values",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Only these import a host's package.
HOSTS = ("fastreid", "torchreid")
HOST_ROOMS = ("fastreid_ext", "torchreid_ext", "compat", "cli/doctor.py")
MAX_LINES = 500
# Longer files, each with its reason.
LONG_FILES: dict[str, str] = {}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path: Path) -> str:
    """Return the folder, or the file, at the top level of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of each import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def own_file(name: str) -> Path | None:
    """Return the file of this package that holds an imported name; None for others."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    for length in range(len(parts), 0, -1):
        base = PACKAGE.joinpath(*parts[1:length])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file() and (length > 1 or file.name == "__init__.py"):
                return file
    raise AssertionError(f"{name} leads to no file")


def test_every_module_has_a_layer() -> None:
    assert {room_of(path) for path in modules()} == set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room_of(path)
    for line, name in imported(path):
        target = own_file(name)
        if target is None or room_of(target) == own:
            continue
        if room_of(target) == "__init__":
            # The public names stand at the top: nothing below may need them.
            assert LEVEL[own] < LEVEL["__init__"], (
                f"{path}:{line} imports the package itself"
            )
            continue
        assert LEVEL[own] < LEVEL[room_of(target)], (
            f"{path.relative_to(PACKAGE)}:{line} imports {name}: "
            f"{room_of(target)} does not lie below {own}"
        )


def test_no_circle_of_imports() -> None:
    edges = {
        path: {target for _, name in imported(path) if (target := own_file(name))} - {path}
        for path in modules()
    }
    # A package's __init__ collects names of its own modules, which do not need it.
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        if path in trail:
            circle = (*trail[trail.index(path) :], path)
            names = [str(file.relative_to(PACKAGE)) for file in circle]
            raise AssertionError(" -> ".join(names))
        if path not in done:
            for target in sorted(edges[path]):
                visit(target, (*trail, path))
            done.add(path)

    for path in edges:
        visit(path, ())


def test_hosts_are_imported_in_their_folders_only() -> None:
    for path in modules():
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith(HOST_ROOMS):
            continue
        for line, name in imported(path):
            assert name.split(".")[0] not in HOSTS, f"{place}:{line} imports {name}"


def test_no_file_is_too_long() -> None:
    sizes = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines())
        for path in modules()
    }
    long = {place for place, size in sizes.items() if size > MAX_LINES}
    assert long == set(LONG_FILES), {place: sizes[place] for place in long}


def test_every_folder_has_a_docstring() -> None:
    for folder in {path.parent for path in modules()}:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert docstring, f"{folder.name}/__init__.py has no docstring"


def test_an_arrow_up_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from selcon_plugin.engine.run import TrainingRun\n")
    ((line, name),) = imported(file)
    assert (line, name) == (2, "selcon_plugin.engine.run.TrainingRun")
    target = own_file(name)
    assert target == PACKAGE / "engine" / "run.py"
    assert LEVEL["memory"] > LEVEL[room_of(target)]
