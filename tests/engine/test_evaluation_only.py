"""Ground-truth identities of the training images reach diagnostics and reports only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import selcon_plugin

PACKAGE = Path(selcon_plugin.__file__).parent
NAMES = ("evaluation_only_pids", "evaluation_only_identities", "_evaluation_only_pids")
# Who may read them: where, and what for.
READERS = {
    # keeps them beside each image and hands them on as a tensor
    ("engine/images.py", "__init__"),
    ("engine/images.py", "evaluation_only_identities"),
    # writes the list of images that a run was begun with
    ("engine/image_list.py", "write_image_list"),
    # measures how well neighbors and clusters agree with them, for the log
    ("engine/run.py", "__post_init__"),
    ("engine/run.py", "diagnostics"),
    ("engine/run.py", "_report"),
}


def readers(file: Path) -> Iterator[tuple[str, str]]:
    """Find the functions in which one of the names occurs, as attribute or in quotes."""
    tree = ast.parse(file.read_text())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            name = getattr(node, "attr", getattr(node, "value", None))
            if name in NAMES:
                where = getattr(function, "name", "lambda")
                yield file.relative_to(PACKAGE).as_posix(), where


def test_nobody_else_reads_the_identities() -> None:
    found = {reader for file in PACKAGE.rglob("*.py") for reader in readers(file)}
    assert found == READERS
