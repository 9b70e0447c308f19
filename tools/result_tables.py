"""Write the tables of measured results into the pages that show them.

    python tools/result_tables.py            # writes them
    python tools/result_tables.py --check    # status 1 if a page is not up to date

Results are kept once, in ``docs/benchmarks/results/*.yml``, with protocol, machine and
commit. In a page, ``<!-- results: FILE/TABLE | COLUMN, COLUMN | ID, ID -->`` begins a table
and ``<!-- results: end -->`` ends it; columns and rows may be left out, and TABLE may be
``caption``. A number outside of such a block that repeats a main result is refused.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("docs/benchmarks/results")
_BLOCK = re.compile(
    r"(?P<begin><!-- results: (?P<view>(?!end )[^>]*?) -->)\n"
    r"(?P<body>.*?)"
    r"(?P<end><!-- results: end -->)",
    re.DOTALL,
)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def load_results(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Return the contents of the result files by their names."""
    files = sorted((root / RESULTS).glob("*.yml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def format_cell(value: Any, form: str) -> str:
    """Format a number, a pair of mean and standard deviation, a text, or nothing."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ± ".join(format(number, form) for number in value)
    return value if isinstance(value, str) else format(value, form)


def render(view: str, results: dict[str, dict[str, Any]], folder: Path) -> str:
    """Return the Markdown of one block.

    Args:
        view: ``FILE/TABLE``, and optionally columns and ids of rows, separated by bars.
        results: From :func:`load_results`.
        folder: Folder of the page, relative to the root, for relative links.

    Returns:
        A table, or the caption of a file.

    Raises:
        ValueError: If there is no such file, table, column or row.
    """
    name, *chosen = (part.strip() for part in view.split("|"))
    try:
        file, table = name.split("/")
        content = results[file]
        if table == "caption":
            return content["caption"]
        columns, rows = content["tables"][table].values()
        shown = _names(chosen, 0) or list(columns)
        forms = {column: columns[column] for column in shown}
        if ids := _names(chosen, 1):
            by_id = {row["id"]: row for row in rows if "id" in row}
            rows = [by_id[key] for key in ids]
    except (KeyError, ValueError) as error:
        raise ValueError(f"there is no result {view!r}: {error}") from error
    cells = [
        shown,
        ["---" for _ in shown],
        *([format_cell(row[name], form) for name, form in forms.items()] for row in rows),
    ]
    lines = [f"| {' | '.join(row)} |" for row in cells]

    def relative(match: re.Match[str]) -> str:
        return f"]({os.path.relpath(match[1], folder).replace(os.sep, '/')}"

    return _LINK.sub(relative, "\n".join(lines))


def _names(chosen: Sequence[str], index: int) -> list[str]:
    text = chosen[index] if len(chosen) > index else ""
    return [part.strip() for part in text.split(",") if part.strip()]


def fill(text: str, results: dict[str, dict[str, Any]], folder: Path) -> str:
    """Return a page with its blocks filled from the results."""

    def block(match: re.Match[str]) -> str:
        body = render(match["view"], results, folder)
        return f"{match['begin']}\n\n{body}\n\n{match['end']}"

    return _BLOCK.sub(block, text)


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages that may show results, relative to the root."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page.relative_to(root) for page in found if not page.is_symlink()]


def main_numbers(results: dict[str, dict[str, Any]]) -> set[str]:
    """Return what no sentence repeats: mAP of every row, and pairs of mAP and Rank-1."""
    tables = [table for content in results.values() for table in content["tables"].values()]
    numbers = set()
    for table in tables:
        form = table["columns"].get("mAP")
        for row in table["rows"]:
            value = row.get("mAP")
            if isinstance(value, list):
                numbers.add(format_cell(value, form))
            elif isinstance(value, float):
                numbers |= {format(value, form) + after for after in (" mAP", " / ")}
            texts = " ".join(cell for cell in row.values() if isinstance(cell, str))
            numbers |= set(re.findall(r"\d+\.\d / \d+\.\d", texts))
    return numbers


def repeated(text: str, numbers: set[str]) -> Iterator[tuple[int, str]]:
    """Find results that are repeated outside of the generated blocks.

    Args:
        text: A page.
        numbers: From :func:`main_numbers`.

    Yields:
        1-based line and number.
    """
    blank = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
    for count, line in enumerate(blank.splitlines(), start=1):
        for number in sorted(numbers):
            if re.search(rf"(?<![\d.]){re.escape(number)}", line):
                yield count, number


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    results = load_results(ROOT)
    numbers = main_numbers(results)
    status = 0
    for page in pages(ROOT):
        old = (ROOT / page).read_text(encoding="utf-8")
        new = fill(old, results, page.parent)
        if old != new:
            print(f"{page}: {'stale' if args.check else 'written'}")
            status = 1 if args.check else status
            if not args.check:
                (ROOT / page).write_text(new, encoding="utf-8")
        for line, number in repeated(new, numbers):
            print(f"{page}:{line}: {number!r} repeats a result of {RESULTS}")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
